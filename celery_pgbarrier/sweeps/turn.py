"""One run of a sweep at a time, without any state of a database session."""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache

from sqlalchemy import Connection, Engine

from celery_pgbarrier.store import sweeps
from celery_pgbarrier.store.sql import Statements
from celery_pgbarrier.sweeps.counts import Counts, Stop

#: How long the turn of a run whose process died stays taken (seconds), on top of its pause.
LEASE = 60.0


class TurnTaken(Exception):
    """Another run of the sweep has the turn."""

    def __init__(self, stop: Stop, message: str) -> None:
        super().__init__(message)
        self.stop = stop


class Turn:
    """The right to run a sweep, and the transactions that are opened under it.

    Where the database has the pgbarrier tables, a row with a lease that each batch renews keeps
    every other run out.  Everywhere, each batch holds a transaction-level advisory lock, so that
    no two batches of a sweep ever run at once.

    Parameters:
        name: the sweep's name.
        lease: seconds for which the turn of a run that died stays taken.
        schema: the schema of the pgbarrier tables.
    """

    def __init__(
        self, engine: Engine, name: str, lease: float, schema: str | None, waits: sweeps.Waits
    ) -> None:
        # Row locks are re-checked against what was committed meanwhile in this level only.
        self._engine = engine.execution_options(isolation_level="READ COMMITTED")
        self._name, self._lease, self._waits = name, lease, waits
        self._schema, self._statements = schema, _statements(schema)
        self._token = str(uuid.uuid4())
        self._leased = False
        self._key = _key(name)

    def take(self) -> datetime:
        """Take the turn; return the database's time.

        Raises:
            TurnTaken: another run has it; the message says who and until when.
        """
        with self._engine.begin() as connection:
            self._enter(connection)
            seen = sweeps.look(connection, self._schema)
            self._leased = bool(seen.turns)
            if self._leased and not sweeps.take(
                connection, self._statements, self._name, self._token, _holder(), self._lease
            ):
                raise TurnTaken(Stop.BUSY, self._taken_by(connection))
        now: datetime = seen.now
        return now

    def look(self) -> datetime:
        """Return the database's time, for a run that changes nothing."""
        with self._engine.connect() as connection:
            now: datetime = sweeps.look(connection, self._schema).now
            return now

    @contextmanager
    def batch(self) -> Iterator[Connection]:
        """Open the transaction of a batch, committed at the end.

        Raises:
            TurnTaken: the turn has passed on to another run.
        """
        with self._engine.begin() as connection:
            self._enter(connection)
            if self._leased and not sweeps.keep(
                connection, self._statements, self._name, self._token, self._lease
            ):
                raise TurnTaken(Stop.LOST_TURN, f"sweep {self._name}: another run took over")
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a transaction that changes nothing."""
        with self._engine.connect() as connection:
            yield connection

    def give(self, counts: Counts) -> None:
        """End the turn."""
        if not self._leased:
            return
        values = {
            "name": self._name,
            "token": self._token,
            "batches": counts.batches,
            "rows": counts.rows,
            "failed": counts.failed,
            "left": counts.left,
            "stopped": counts.stopped.value if counts.stopped else None,
        }
        with self._engine.begin() as connection:
            sweeps.give(connection, self._statements, values)

    def _enter(self, connection: Connection) -> None:
        if not sweeps.enter(connection, self._key, self._waits):
            raise TurnTaken(Stop.BUSY, f"sweep {self._name}: another run is in the middle of it")

    def _taken_by(self, connection: Connection) -> str:
        run = sweeps.holder(connection, self._statements, self._name)
        return (
            f"sweep {self._name}: a run of {run.holder} since {run.started_at:%F %T} has the "
            f"turn until {run.expires_at:%F %T} (database time), later if it goes on"
        )


def _holder() -> str:
    return f"{socket.gethostname()} pid {os.getpid()}"


def _key(name: str) -> int:
    digest = hashlib.sha256(f"celery_pgbarrier.sweep.{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


@lru_cache
def _statements(schema: str | None) -> Statements:
    return Statements(schema)
