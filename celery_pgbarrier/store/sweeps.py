"""Whose turn a sweep is, and what its last run did: the table ``pgbarrier_sweep``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from celery_pgbarrier.store.schema import qualified
from celery_pgbarrier.store.sql import Statements

TABLE = "pgbarrier_sweep"

#: Whether the table is there for this role, and what time it is.
_LOOK = """
SELECT clock_timestamp() AS now, CASE WHEN to_regclass(:table) IS NULL THEN false
       ELSE has_table_privilege(to_regclass(:table), 'INSERT')
        AND has_table_privilege(to_regclass(:table), 'UPDATE')
        AND has_table_privilege(to_regclass(:table), 'SELECT') END AS turns
"""

#: Open a batch: nobody else is inside one of this sweep, and its waits are bounded.  All of it
#: ends with the transaction, so that it holds through a pooler in transaction mode.
_OPEN = """
SELECT pg_try_advisory_xact_lock(:key),
       set_config('lock_timeout', COALESCE(CAST(:lock_timeout AS text),
                                           current_setting('lock_timeout')), true),
       set_config('statement_timeout', COALESCE(CAST(:statement_timeout AS text),
                                                current_setting('statement_timeout')), true)
"""

#: Take the turn: it is nobody's, or its lease has run out.
_TAKE = """
INSERT INTO {s}pgbarrier_sweep AS s (name, token, holder, started_at, expires_at)
VALUES (:name, CAST(:token AS uuid), :holder, clock_timestamp(),
        clock_timestamp() + make_interval(secs => :lease))
ON CONFLICT (name) DO UPDATE SET token = EXCLUDED.token, holder = EXCLUDED.holder,
    started_at = EXCLUDED.started_at, expires_at = EXCLUDED.expires_at
 WHERE s.token IS NULL OR s.expires_at < clock_timestamp()
RETURNING name
"""

#: Renew the lease, with each batch.
_KEEP = """
UPDATE {s}pgbarrier_sweep SET expires_at = clock_timestamp() + make_interval(secs => :lease)
 WHERE name = :name AND token = CAST(:token AS uuid)
"""

#: The run has ended.
_GIVE = """
UPDATE {s}pgbarrier_sweep
   SET token = NULL, expires_at = NULL, finished_at = clock_timestamp(), batches = :batches,
       rows = :rows, failed = :failed, left_over = :left, stopped = :stopped
 WHERE name = :name AND token = CAST(:token AS uuid)
"""

_HOLDER = "SELECT holder, started_at, expires_at FROM {s}pgbarrier_sweep WHERE name = :name"

_RUNS = """
SELECT name, token IS NOT NULL AND expires_at >= clock_timestamp() AS running, holder, started_at,
       finished_at, batches, rows, failed, left_over, stopped FROM {s}pgbarrier_sweep
"""

#: Which server, database and tables a connection sees.
_PLACE = """
SELECT current_database(), CAST(pg_postmaster_start_time() AS text),
       CAST(CAST(to_regclass(:table) AS oid) AS text)
"""


@dataclass(frozen=True)
class Waits:
    """How long a batch's statements may wait for a lock, and run (seconds; None: as it is set)."""

    lock: float | None
    statement: float | None


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{round(seconds * 1000)}ms"


def look(connection: Connection, schema: str | None) -> Any:
    """Return the database's ``now``, and whether this role can use the table (``turns``)."""
    return connection.execute(text(_LOOK), {"table": qualified(TABLE, schema)}).one()


def enter(connection: Connection, key: int, waits: Waits) -> bool:
    """Open a batch in the transaction of *connection*; False while another run is inside one."""
    parameters = {
        "key": key,
        "lock_timeout": _milliseconds(waits.lock),
        "statement_timeout": _milliseconds(waits.statement),
    }
    return bool(connection.execute(text(_OPEN), parameters).scalar())


def take(
    connection: Connection, statements: Statements, name: str, token: str, holder: str, lease: float
) -> bool:
    """Take a sweep's turn for *lease* seconds; False where another run has it."""
    parameters = {"name": name, "token": token, "holder": holder, "lease": lease}
    return connection.execute(statements[_TAKE], parameters).first() is not None


def keep(
    connection: Connection, statements: Statements, name: str, token: str, lease: float
) -> bool:
    """Renew a turn; False where it has passed on."""
    parameters = {"name": name, "token": token, "lease": lease}
    return connection.execute(statements[_KEEP], parameters).rowcount == 1


def give(connection: Connection, statements: Statements, values: dict[str, Any]) -> None:
    """End a turn and keep what the run did."""
    connection.execute(statements[_GIVE], values)


def holder(connection: Connection, statements: Statements, name: str) -> Any:
    """Return who has a turn, since when and until when."""
    return connection.execute(statements[_HOLDER], {"name": name}).first()


def runs(connection: Connection, statements: Statements) -> dict[str, Any]:
    """Return the last run of each sweep by name."""
    return {row.name: row for row in connection.execute(statements[_RUNS])}


def place(connection: Connection, schema: str | None) -> tuple[Any, ...]:
    """Return what tells one database with pgbarrier tables from another."""
    table = qualified("pgbarrier_task", schema)
    return tuple(connection.execute(text(_PLACE), {"table": table}).one())
