"""Connections, transactions, retries: the only module that commits."""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from celery_pgbarrier.errors import (
    ConfigurationError,
    DatabaseRetryLater,
    DatabaseUnavailable,
)
from celery_pgbarrier.store import direct
from celery_pgbarrier.store import schema as versions
from celery_pgbarrier.store.sql import Statements
from celery_pgbarrier.store.trouble import (
    READ_ONLY,
    cut_off,
    explained,
    first_line,
    is_transient,
    sqlstate,
)
from celery_pgbarrier.store.url import safe_url

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: For how long a connection is kept outside of the pool (seconds).
_KEEP = 60.0
#: Connections of a parent that its children must neither use nor close.
_inherited: list[Any] = []
#: A connection that has gone silent is given up: libpq's parameters, in seconds but for the last,
#: which is in milliseconds (PostgreSQL manual, 34.1.2).
_SILENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15000,
}


class Commits(Protocol):
    """A transaction that somebody else began."""

    def commit(self) -> Any:
        """Commit it."""
        ...


def commit(transaction: Commits) -> None:
    """Commit a transaction that was begun outside of :meth:`Database.transaction`."""
    transaction.commit()


@dataclass(eq=False)
class Database:
    """One database as one process sees it: a bounded pool, made anew after a fork.

    Parameters:
        url: an SQLAlchemy PostgreSQL URL (see :func:`celery_pgbarrier.store.url.parse_url`).
        schema: the schema of the tables, None for the search path's first.
        auto_migrate: whether missing or old tables are brought up to date at first use.
        engine_options: keyword arguments of :func:`sqlalchemy.create_engine`.
        idle_timeout: seconds for which a transaction may stand idle before the server ends it, so
            that a process that is paused within one does not keep its locks.
    """

    url: URL = field(repr=False)  # a password may stand in its query
    schema: str | None = None
    auto_migrate: bool = True
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    idle_timeout: float = 60.0

    def __post_init__(self) -> None:
        self.sql = Statements(self.schema)
        limit = f"idle_in_transaction_session_timeout = {max(1, round(self.idle_timeout * 1000))}"
        self._begin = f"BEGIN; SET LOCAL {limit}"  # one round trip
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._kept: list[tuple[Connection, float]] = []
        self._most: float = 0  # connections of the pool
        self._recycle: float = 0  # seconds after which the pool replaces one
        self._pid = 0
        self._checked = False
        self._lent: Database | None = None

    # -- connections

    def engine(self) -> Engine:
        """Return this process's engine; a child never uses its parent's."""
        if self._engine is None or self._pid != os.getpid():
            # A lock inherited in its locked state would never be freed.
            if self._pid != os.getpid():
                self._lock = threading.Lock()
            with self._lock:
                if self._engine is None or self._pid != os.getpid():
                    if self._engine is not None:
                        self._engine.dispose(close=False)
                        _inherited.extend(self._kept)
                        self._kept = []
                    self._engine, self._pid = self._create(), os.getpid()
        return self._engine

    def _create(self) -> Engine:
        options = dict(self.engine_options)
        if "poolclass" not in options:
            options = {"pool_size": 5, "max_overflow": 10, "pool_recycle": 3600, **options}
        extra = options.get("max_overflow", 0)
        recycle = options.get("pool_recycle", -1)
        self._recycle = math.inf if recycle < 0 else recycle
        self._most = math.inf if extra < 0 else options.get("pool_size", 0) + extra
        # In autocommit mode a driver's rollback does nothing; transactions end themselves.
        options.setdefault("pool_reset_on_return", None)
        arguments = {**_SILENCE, **(options.get("connect_args") or {})}
        if self.url.get_driver_name() == "psycopg":
            arguments.setdefault("prepare_threshold", None)  # PgBouncer in transaction mode
        options["connect_args"] = {
            key: value for key, value in arguments.items() if key not in self.url.query
        }
        # One statement is one transaction; longer ones say BEGIN and COMMIT. Switching the mode of
        # a connection from one to the other costs round trips, and session state.
        options["isolation_level"] = "AUTOCOMMIT"
        try:
            return sa.create_engine(self.url, **options)
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"the driver {self.url.get_driver_name()} is not installed: pip install "
                + ("psycopg2-binary" if error.name == "psycopg2" else "'celery-pgbarrier[psycopg]'")
            ) from None

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """Lend a connection, which is kept for the next statement if all went well."""
        connection, since = self._take()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._give(connection, since)

    def _take(self) -> tuple[Connection, float]:
        """Return a connection, kept or of the pool, and when it was taken from the pool."""
        engine = self.engine()
        try:
            connection, since = self._kept.pop()
        except IndexError:
            return engine.connect(), time.monotonic()
        if time.monotonic() - since < min(_KEEP, self._recycle):
            return connection, since
        connection.close()  # the pool looks at its age before it gives it again
        return engine.connect(), time.monotonic()

    def _give(self, connection: Connection, since: float) -> None:
        """Keep a connection whose transaction has ended, or give it back to the pool.

        To check one out costs a process more than the driver takes for a short statement.  None is
        kept where another thread may be waiting for it, or where each is to be tested before use.
        """
        pool = connection.engine.pool
        if (
            not self._kept
            and type(pool) is QueuePool
            and pool.checkedout() < self._most
            and not self.engine_options.get("pool_pre_ping")
        ):
            self._kept.append((connection, since))
            if pool.checkedout() >= self._most:  # somebody came meanwhile
                self._let_go()
        else:
            connection.close()

    def _let_go(self) -> None:
        """Give what is kept back to the pool."""
        while self._kept and self._pid == os.getpid():
            with suppress(Exception):  # another thread took it, or it is dead
                self._kept.pop()[0].close()

    def dispose(self) -> None:
        """Close the idle connections of this process."""
        if self._engine is not None and self._pid == os.getpid():
            self._let_go()
            self._engine.dispose()
        if self._lent is not None:
            self._lent.dispose()

    def lend(self) -> Connection:
        """Return a connection for a transaction of the user's code; the caller closes it.

        It comes from a pool of its own: code that waits for such a connection must not hold up the
        statements of code that has one.
        """
        if self._lent is None:
            # The engine's own transactions end themselves; those of others may not.
            options = {"pool_reset_on_return": "rollback", **self.engine_options}
            self._lent = Database(self.url, self.schema, False, options)
        connection = self._lent.engine().connect()
        return connection.execution_options(isolation_level="READ COMMITTED")

    def patiently(self, work: Callable[[], T], patience: float) -> T:
        """Run *work*, which commits nothing, again while there is trouble that passes.

        Parameters and errors as :meth:`transaction`.
        """
        return self._persist(lambda committing: work(), patience)

    # -- the two ways to work

    def transaction(
        self, work: Callable[[Connection], T], patience: float = 0.0, check: bool = True
    ) -> T:
        """Run *work* in one transaction and return what it returns.

        *work* may run more than once (after a lost connection, a deadlock, or an answer to COMMIT
        that was lost), so it must be idempotent: every statement here is, by token or by call.

        Parameters:
            patience: seconds for which trouble that passes is retried.
            check: whether the version of the tables is checked first.

        Raises:
            DatabaseUnavailable: out of patience, and nothing was committed.
            DatabaseRetryLater: out of patience, and an answer to COMMIT was lost before.
            SchemaError: the tables are missing or behind.
        """

        def attempt(committing: Callable[[], None]) -> T:
            with self._connection() as connection:
                try:
                    direct.run(connection, self._begin, {})
                    result = work(connection)
                    committing()
                    direct.run(connection, "COMMIT", {})
                except BaseException:
                    _roll_back(connection)
                    raise
                return result

        return self._persist(attempt, patience, check)

    def statement(
        self, template: str, parameters: Mapping[str, Any], patience: float = 0.0
    ) -> list[Any]:
        """Run one idempotent statement as its own transaction; return its rows as named tuples.

        Parameters and errors as :meth:`transaction`.
        """
        return self._statement(template, parameters, patience)[0]

    def count(self, template: str, parameters: Mapping[str, Any], patience: float = 0.0) -> int:
        """Run one statement as its own transaction; return the number of rows it touched."""
        return self._statement(template, parameters, patience)[1]

    def _statement(
        self, template: str, parameters: Mapping[str, Any], patience: float
    ) -> tuple[list[Any], int]:
        def attempt(committing: Callable[[], None]) -> tuple[list[Any], int]:
            with self._connection() as connection:
                committing()
                return direct.run(connection, self.sql.plain(template), parameters)

        return self._persist(attempt, patience)

    # -- trouble

    def _persist(
        self, attempt: Callable[[Callable[[], None]], T], patience: float, check: bool = True
    ) -> T:
        deadline = time.monotonic() + patience
        pause, ambiguous, reached, stale = 0.05, False, False, True

        def committing() -> None:
            nonlocal reached
            reached = True

        while True:
            try:
                if check:
                    self._ensure_schema(max(deadline - time.monotonic(), 0.0))
                reached = False
                return attempt(committing)
            except Exception as error:
                if not is_transient(error):
                    raise explained(error, self.url) from error
                self._let_go()  # it may have ended with this one
                ambiguous = ambiguous or (reached and cut_off(error))
                left = deadline - time.monotonic()
                if stale and isinstance(error, DBAPIError) and error.connection_invalidated:
                    stale = False  # a pooled connection from before a restart: try a new one
                    continue
                if left <= 0:
                    kind = DatabaseRetryLater if ambiguous else DatabaseUnavailable
                    raise kind(f"{safe_url(self.url)} is away: {first_line(error)}") from error
                if isinstance(error, DBAPIError) and sqlstate(error) == READ_ONLY:
                    self.dispose()  # a server that is read-only may no longer be the primary
                logger.warning("PostgreSQL is away, trying again: %s", first_line(error))
                time.sleep(min(left, pause * (0.5 + random.random())))
                pause = min(pause * 2, 2.0)

    def _ensure_schema(self, patience: float) -> None:
        if self._checked:
            return

        def check(connection: Connection) -> None:
            if self.auto_migrate and versions.current(connection, self.schema) != versions.head():
                versions.upgrade(connection, self.schema)
            versions.require(connection, self.schema)

        self.transaction(check, patience, check=False)
        self._checked = True


def _roll_back(connection: Connection) -> None:
    """End a transaction that failed; a connection that cannot is not used again."""
    if connection.invalidated:
        return
    try:
        connection.exec_driver_sql("ROLLBACK")
    except Exception:
        connection.invalidate()
