"""What PostgreSQL says about the chord."""

from __future__ import annotations

from typing import Any

from sqlalchemy import create_engine, pool, text

MEMBERS = """
    SELECT count(DISTINCT id) AS ids,
           count(*) FILTER (WHERE state = 'done' AND status = 'SUCCESS') AS succeeded,
           coalesce(sum(attempt), 0) AS attempts,
           coalesce(sum(crashes), 0) AS crashes
    FROM pgbarrier_task WHERE barrier_id = :id
"""
DONE = "SELECT count(*) FROM pgbarrier_task WHERE barrier_id = :id AND state = 'done'"
BARRIER = "SELECT state FROM pgbarrier_barrier WHERE id = :id"
TASK = "SELECT state FROM pgbarrier_task WHERE id = :id"
STATES = "SELECT state, status, count(*) FROM pgbarrier_task GROUP BY state, status ORDER BY 1, 2"
BODY_RUNS = "SELECT count(*) FROM demo_body_run"
CREATE = "CREATE TABLE demo_body_run (at timestamptz NOT NULL DEFAULT clock_timestamp())"


class Ledger:
    """Reads the package's tables, and one of the demo's own with a row for each run of the body."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url, poolclass=pool.NullPool)
        with self.engine.begin() as connection:
            connection.execute(text(CREATE))

    def members_done(self, barrier: str) -> int:
        return int(self._value(DONE, id=barrier))

    def members(self, barrier: str) -> dict[str, int]:
        with self.engine.connect() as connection:
            row = connection.execute(text(MEMBERS), {"id": barrier}).mappings().one()
            return {name: int(value) for name, value in row.items()}

    def barrier_state(self, barrier: str) -> str | None:
        state: str | None = self._value(BARRIER, id=barrier)
        return state

    def task_state(self, task_id: str) -> str | None:
        state: str | None = self._value(TASK, id=task_id)
        return state

    def body_runs(self) -> int:
        return int(self._value(BODY_RUNS))

    def states(self) -> list[str]:
        with self.engine.connect() as connection:
            return [" ".join(map(str, row)) for row in connection.execute(text(STATES))]

    def _value(self, statement: str, **values: str) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(text(statement), values).scalar()
