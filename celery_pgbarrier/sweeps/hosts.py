"""Where a sweep runs: its engine, and the result backend beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from celery import Celery
from sqlalchemy import Connection, Engine

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.store import sweeps
from celery_pgbarrier.store.database import Database
from celery_pgbarrier.unit import Host

EngineSource = Engine | Callable[[], Engine] | None


class Engines:
    """The engine of a sweep, made when it is first needed in a process.

    A pool child never uses the connections of its parent.
    """

    def __init__(self, source: EngineSource) -> None:
        self._source = source
        self._engine: Engine | None = None
        self._pid = os.getpid()

    def find(self, name: str, engine: Engine | None, app: Celery | None) -> Engine:
        """Return the engine of a run: the given one, the declared one, or the result backend's.

        Raises:
            ConfigurationError: there is none, or it is not a synchronous one of PostgreSQL.
        """
        found = engine or self._own() or _of_backend(app)
        if found is None:
            raise ConfigurationError(
                f"sweep {name} has no engine: call run(engine), or declare it with engine=..., or "
                "set result_backend to pgbarrier://user:password@host:port/database"
            )
        if not isinstance(found, Engine):
            raise ConfigurationError(f"sweep {name} needs a synchronous Engine, not {found!r}")
        if found.dialect.name != "postgresql":
            raise ConfigurationError(f"sweep {name} needs PostgreSQL, not {found.dialect.name}")
        return found

    def _own(self) -> Engine | None:
        if self._source is None:
            return None
        if isinstance(self._source, Engine):
            if self._pid != os.getpid():
                self._source.dispose(close=False)
                self._pid = os.getpid()
            return self._source
        if self._engine is None or self._pid != os.getpid():
            self._engine, self._pid = self._source(), os.getpid()
        return self._engine


def find(app: Celery | None) -> Host | None:
    """Return the app's result backend if it is ``pgbarrier``, None otherwise."""
    backend: Any = app.backend if app is not None else None
    if isinstance(getattr(backend, "database", None), Database):
        host: Host = backend
        return host
    return None


def schema(app: Celery | None) -> str | None:
    """Return the schema of the app's pgbarrier tables."""
    host = find(app)
    return host.settings.schema if host is not None else None


def _of_backend(app: Celery | None) -> Engine | None:
    host = find(app)
    if host is None:
        return None
    host.database.transaction(lambda connection: None)  # makes the tables at first use
    return host.database.engine()


def publisher(name: str, app: Celery | None) -> Host:
    """Return the result backend whose outbox a sweep's messages go into.

    Raises:
        ConfigurationError: there is no app, or it has another result backend.
    """
    if app is None:
        raise ConfigurationError(
            f"{name} sends tasks and needs to know the app: call register(app), or pass app=..."
        )
    host = find(app)
    if host is None:
        raise ConfigurationError(
            f"{name} sends tasks through the outbox of the pgbarrier result backend: set "
            "result_backend to pgbarrier://user:password@host:port/database"
        )
    return host


def same_database(connection: Connection, host: Host, name: str) -> None:
    """Check that rows and messages can be committed in one transaction.

    Raises:
        ConfigurationError: the table is in another database than the pgbarrier tables.
    """
    ours = host.database.transaction(lambda own: sweeps.place(own, host.settings.schema))
    theirs = sweeps.place(connection, host.settings.schema)
    if ours != theirs:
        raise ConfigurationError(
            f"{name} records its messages in the transaction of its rows, but its table is in "
            f"database {theirs[0]!r} and the pgbarrier tables are in {ours[0]!r} "
            f"({host.database.url.render_as_string(hide_password=True)}): point result_backend "
            "at the database of the table, or the engine at that of the result backend"
        )
