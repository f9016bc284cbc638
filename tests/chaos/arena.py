"""The servers of a campaign, as own children: PostgreSQL, a broker, a store for results."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from types import TracebackType

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from celery_pgbarrier.embedded import EmbeddedBroker, EmbeddedPostgres
from celery_pgbarrier.embedded.server import EmbeddedServer
from celery_pgbarrier.store import schema
from tests.chaos import ledger
from tests.chaos.kinds import Kind

#: Processes are killed, not the machine: what a server has written to a file is safe.
POSTGRES = {"fsync": "off", "max_connections": "300"}


class Arena:
    """Servers that live as long as the campaign of one backend; a context manager."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.postgres = EmbeddedPostgres(options=POSTGRES)
        self.broker = EmbeddedBroker()
        # A store that remembers across its restarts, as PostgreSQL does.
        self.results = EmbeddedBroker(options={"appendonly": "yes", "appendfsync": "always"})
        self._stack = ExitStack()
        self._numbers = itertools.count(1)

    @property
    def store(self) -> EmbeddedServer:
        """The server that keeps the backend's results."""
        return self.results if self.kind.name == "redis" else self.postgres

    def __enter__(self) -> Arena:
        for server in (self.postgres, self.broker, self.results):
            self._stack.enter_context(server)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def new_database(self) -> str:
        """The URL of a new database with the ledger's tables; broker and store are emptied."""
        name = f"chaos_{next(self._numbers)}"
        self.postgres.create_database(name)
        url = self.postgres.url(name)
        statements = ledger.TABLES
        if self.kind.ours:
            schema.migrate(url)
            statements += ledger.TRIGGER
        with create_engine(url, poolclass=NullPool).begin() as connection:
            connection.exec_driver_sql(statements)
        self.broker.flush()
        self.results.flush()
        return url
