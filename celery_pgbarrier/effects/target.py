"""Where a block writes: a connection in a transaction of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

from sqlalchemy import Connection, Engine, Result, TextClause, event
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_pgbarrier.errors import ConfigurationError, TransactionError
from celery_pgbarrier.store.database import Database, commit

#: What ``self.transaction(step, on=...)`` takes.
Place: TypeAlias = "Session | Connection | Engine | sessionmaker[Any] | scoped_session[Any]"

_COMMITS = "self.transaction() commits at the end of its block: take the commit out of the block"


class Skipped(BaseException):
    """Leaves the block of a step that is done already; its end swallows it."""


class Target(Protocol):
    """A connection, from the beginning of its transaction to its end."""

    def begin(self) -> None:
        """Begin the transaction.

        Raises:
            TransactionError: one is going on already.
            ConfigurationError: the connection has no transactions, or is none to PostgreSQL.
        """
        ...

    def execute(self, clause: TextClause, parameters: Mapping[str, Any]) -> Result[Any]:
        """Run a statement in it."""
        ...

    def flush(self) -> None:
        """Write what the user's code has left pending."""
        ...

    def commit(self) -> None:
        """Commit it."""
        ...

    def rollback(self) -> None:
        """Roll it back; nothing is raised where it has ended."""
        ...

    def skipping(self) -> Any:
        """Return a context in which the first use of the connection raises :exc:`Skipped`."""
        ...

    def close(self) -> None:
        """Give back what was opened for it."""
        ...

    @property
    def session(self) -> Session:
        """An SQLAlchemy session on it."""
        ...

    @property
    def connection(self) -> Any:
        """The connection itself."""
        ...


class ConnectionTarget:
    """An SQLAlchemy connection."""

    def __init__(self, connect: Callable[[], Connection], owned: bool) -> None:
        self._connect, self._owned = connect, owned
        self._connection: Connection | None = None
        self._session: Session | None = None
        self._committing = False

    @property
    def connection(self) -> Connection:
        """The connection."""
        assert self._connection is not None
        return self._connection

    @property
    def session(self) -> Session:
        """A session on it, whose ``commit()`` only flushes."""
        if self._session is None:
            self._session = Session(bind=self.connection)
        return self._session

    def begin(self) -> None:
        """Begin the transaction; see :class:`Target`."""
        self.close()
        connection = self._connection = self._connect()
        if connection.in_transaction():
            raise TransactionError(
                "the connection is in a transaction already: commit it or roll it back before "
                "self.transaction(), or pass its Engine"
            )
        _require_transactions(connection)
        self._transaction = connection.begin()
        event.listen(connection, "commit", self._guard)

    def _guard(self, connection: Connection) -> None:
        if not self._committing:
            raise TransactionError(_COMMITS)

    def execute(self, clause: TextClause, parameters: Mapping[str, Any]) -> Result[Any]:
        """Run a statement."""
        return self.connection.execute(clause, parameters)

    def flush(self) -> None:
        """Write what is pending in the session."""
        if self._session is not None:
            self._session.flush()
        if not self._transaction.is_active:
            raise TransactionError(
                "the block has ended the transaction of self.transaction(): raise an error to "
                "roll it back, or use a savepoint, session.begin_nested()"
            )

    def commit(self) -> None:
        """Commit."""
        self._committing = True
        try:
            commit(self._transaction)
        finally:
            self._committing = False

    def rollback(self) -> None:
        """Roll back; a connection that cannot is not used again."""
        if self._session is not None:
            self._session.close()
        try:
            self.connection.rollback()
            self.connection.connection.rollback()  # a commit that was refused has left it open
        except Exception:
            self.connection.invalidate()

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Let the next transaction of the connection raise :exc:`Skipped`."""
        connection = self.connection
        event.listen(connection, "begin", _skip)
        try:
            yield
        finally:
            event.remove(connection, "begin", _skip)
            if connection.in_transaction():
                connection.rollback()

    def close(self) -> None:
        """Close what was opened here."""
        connection, self._connection = self._connection, None
        if self._session is not None:
            self._session.close()
            self._session = None
        if connection is None:
            return
        if event.contains(connection, "commit", self._guard):
            event.remove(connection, "commit", self._guard)
        if self._owned:
            connection.close()


class SessionTarget:
    """A session of the user's."""

    def __init__(self, session: Session, owned: bool) -> None:
        self._user, self._owned = session, owned
        self._committing = False

    @property
    def connection(self) -> Connection:
        """The connection that the session uses."""
        return self._user.connection()

    @property
    def session(self) -> Session:
        """The session."""
        return self._user

    def begin(self) -> None:
        """Begin the transaction; see :class:`Target`."""
        session = self._user
        if session.in_transaction():
            raise TransactionError(
                "the session is in a transaction already: commit it or roll it back before "
                "self.transaction(), or pass its sessionmaker"
            )
        try:
            _require_transactions(session.connection())
        except ConfigurationError:
            session.rollback()
            raise
        event.listen(session, "before_commit", self._guard)

    def _guard(self, session: Session) -> None:
        if not self._committing and not session.in_nested_transaction():
            raise TransactionError(_COMMITS)

    def execute(self, clause: TextClause, parameters: Mapping[str, Any]) -> Result[Any]:
        """Run a statement."""
        return self.connection.execute(clause, parameters)

    def flush(self) -> None:
        """Write what is pending."""
        self._user.flush()

    def commit(self) -> None:
        """Commit."""
        self._committing = True
        try:
            commit(self._user)
        finally:
            self._committing = False

    def rollback(self) -> None:
        """Roll back; a connection that cannot is not used again."""
        try:
            self._user.rollback()
        except Exception:
            self._user.invalidate()

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Let the next transaction of the session raise :exc:`Skipped`."""
        event.listen(self._user, "after_begin", _skip)
        try:
            yield
        finally:
            event.remove(self._user, "after_begin", _skip)
            self.rollback()

    def close(self) -> None:
        """Close what was opened here."""
        if event.contains(self._user, "before_commit", self._guard):
            event.remove(self._user, "before_commit", self._guard)
        if self._owned:
            self._user.close()


def _skip(*_: Any) -> None:
    raise Skipped


def _require_transactions(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        raise ConfigurationError(
            f"self.transaction() needs the PostgreSQL database of the result backend, "
            f"not {connection.dialect.name}"
        )
    if getattr(connection.connection.driver_connection, "autocommit", False):
        raise ConfigurationError(
            "the connection given to self.transaction() is in AUTOCOMMIT mode: pass one with "
            'transactions, engine.execution_options(isolation_level="READ COMMITTED")'
        )


def target_for(on: Any, using: Any, database: Database | None) -> Target:
    """Return where a block writes.

    Parameters:
        on: what SQLAlchemy thing the user gave, or a Django connection.
        using: a Django database alias.
        database: that of the result backend, None where another backend is configured.

    Raises:
        ConfigurationError: what was given is nothing of these, or nothing was given and the result
            backend has no database.
    """
    if on is not None and using is not None:
        raise ConfigurationError("self.transaction() takes on= or using=, not both")
    if using is not None or hasattr(on, "in_atomic_block"):
        from celery_pgbarrier.effects.django import DjangoTarget

        return DjangoTarget(using if using is not None else on.alias)
    if on is None:
        if database is None:
            raise ConfigurationError(
                "self.transaction() needs the pgbarrier result backend, or on= or using= for a "
                "database: set result_backend to pgbarrier://user:password@host:port/database"
            )
        return ConnectionTarget(database.lend, owned=True)
    if isinstance(on, Engine):
        return ConnectionTarget(on.connect, owned=True)
    if isinstance(on, Connection):
        return ConnectionTarget(lambda: on, owned=False)
    if isinstance(on, (sessionmaker, scoped_session)):
        return SessionTarget(on(), owned=isinstance(on, sessionmaker))
    if isinstance(on, Session):
        return SessionTarget(on, owned=False)
    raise ConfigurationError(
        f"self.transaction(on=...) takes an SQLAlchemy Session, Connection, Engine or sessionmaker "
        f"or a Django connection, not {type(on).__name__}"
    )
