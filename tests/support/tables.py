"""What stands in the tables, and time passing in them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, create_engine, text
from sqlalchemy.pool import NullPool

from celery_pgbarrier import results


def close_pools() -> None:
    """Close the connections that the backends of this process keep open."""
    while results._databases:
        results._databases.popitem()[1].dispose()


class Tables:
    """The tables of a test's database, seen and changed past the package."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def ask(self, query: str, **values: Any) -> list[Row[Any]]:
        """Run a query or an update; return its rows."""
        with self._engine.connect() as connection:
            result = connection.execute(text(query), values)
            return list(result.all()) if result.returns_rows else []

    def value(self, query: str, **values: Any) -> Any:
        """Run a query; return the first column of its first row."""
        rows = self.ask(query, **values)
        return rows[0][0] if rows else None

    def task(self, task_id: str) -> Row[Any]:
        """One task's row."""
        (row,) = self.ask("SELECT * FROM pgbarrier_task WHERE id = :id", id=task_id)
        return row

    def count(self, table: str, where: str = "true", **values: Any) -> int:
        """How many rows of ``pgbarrier_<table>`` there are."""
        return int(
            self.value(f"SELECT count(*) FROM pgbarrier_{table} WHERE {where}", **values) or 0
        )

    def barrier_states(self) -> list[str]:
        """The states of all barriers."""
        return [row.state for row in self.ask("SELECT state FROM pgbarrier_barrier ORDER BY id")]

    def overdue(self) -> None:
        """Let time pass until every message that waits is overdue."""
        self.ask("""
            UPDATE pgbarrier_task SET due_at = due_at - interval '1 day',
                   published_at = published_at - interval '1 day'
             WHERE due_at IS NOT NULL
        """)
        self.ask("""
            UPDATE pgbarrier_queue SET probe_sent_at = probe_sent_at - interval '1 day',
                   probe_of = probe_of - interval '1 day',
                   claimed_through = claimed_through - interval '1 day'
        """)
        self.ask("UPDATE pgbarrier_dispatch SET due_at = due_at - interval '1 day'")
        self.ask("UPDATE pgbarrier_barrier SET ready_at = ready_at - interval '1 day'")

    def expire(self) -> None:
        """Let time pass until everything that expires has expired."""
        for table in ("task", "barrier", "group"):
            self.ask(
                f"UPDATE pgbarrier_{table} SET expires_at = clock_timestamp() - interval '1 s' "
                "WHERE expires_at IS NOT NULL"
            )

    def silence(self, worker: str) -> None:
        """Let a worker be silent for ten minutes."""
        self.ask(
            """
            UPDATE pgbarrier_worker SET beat_at = beat_at - interval '10 min',
                   suspect_at = suspect_at - interval '10 min'
             WHERE id = CAST(:id AS uuid)
            """,
            id=worker,
        )

    def cut_connections(self) -> int:
        """Terminate every other connection to this database; how many there were."""
        return int(
            self.value("""
                SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                 WHERE datname = current_database() AND pid <> pg_backend_pid()
                   AND backend_type = 'client backend'
            """)
        )
