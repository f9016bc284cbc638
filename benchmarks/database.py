"""What PostgreSQL itself counts."""

from __future__ import annotations

import time
from collections import UserDict
from typing import Any

from sqlalchemy import text

from tests.support.databases import autocommit

#: Backends report their counts when they have been idle for ten seconds (PostgreSQL 15, pgstat.c,
#: PGSTAT_IDLE_INTERVAL), or with a transaction that ends a second after the last report.
SETTLED = 11.0

_COUNTERS = text("""
SELECT d.xact_commit + d.xact_rollback AS transactions,
       d.tup_inserted AS inserted, d.tup_updated AS updated, d.tup_deleted AS deleted,
       (SELECT COALESCE(sum(n_tup_hot_upd), 0) FROM pg_stat_user_tables) AS hot,
       pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0') AS wal
  FROM pg_stat_database d WHERE d.datname = current_database()
""")

_STATEMENTS = text("""
SELECT left(regexp_replace(s.query, '\\s+', ' ', 'g'), 100) AS query,
       s.calls, s.rows, s.wal_bytes, s.total_exec_time AS ms
  FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
 WHERE d.datname = current_database() AND s.query !~ 'pg_stat|pg_wal|pg_get_wal|EXPLAIN'
""")


class Counters(UserDict[str, float]):
    """Counts that can be taken from one another."""

    def __sub__(self, other: Counters) -> Counters:
        return Counters({key: self[key] - other[key] for key in self})


class Statistics:
    """The counters of one database."""

    def __init__(self, url: str) -> None:
        self.url = url

    def settle(self) -> None:
        """Wait until idle backends have reported."""
        time.sleep(SETTLED)

    def read(self) -> Counters:
        """Transactions, rows written, heap-only updates, and WAL bytes (of the whole server)."""
        with autocommit(self.url) as connection:
            row = connection.execute(_COUNTERS).one()
        return Counters({key: float(value) for key, value in row._mapping.items()})

    def statements(self) -> dict[str, dict[str, Any]]:
        """What pg_stat_statements has of this database by query; nothing where it is not loaded."""
        with autocommit(self.url) as connection:
            loaded = connection.execute(text("SHOW shared_preload_libraries")).scalar()
            if "pg_stat_statements" not in str(loaded):
                return {}
            connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
            found: dict[str, dict[str, Any]] = {}
            for row in connection.execute(_STATEMENTS):
                known = found.setdefault(row.query, {"calls": 0, "rows": 0, "wal": 0, "ms": 0.0})
                known["calls"] += int(row.calls)
                known["rows"] += int(row.rows)
                known["wal"] += int(row.wal_bytes)
                known["ms"] += float(row.ms)
        return found

    def wal(self, start: float, end: float) -> tuple[float, float] | None:
        """Bytes of WAL records and of full pages between two positions (PostgreSQL 15+)."""
        query = text("""
            SELECT sum(record_size), sum(fpi_size)
              FROM pg_get_wal_stats(CAST('0/0' AS pg_lsn) + :start, CAST('0/0' AS pg_lsn) + :end)
        """)
        with autocommit(self.url) as connection:
            try:
                connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS pg_walinspect")
                records, pages = connection.execute(query, {"start": start, "end": end}).one()
            except Exception:
                return None
        return float(records or 0), float(pages or 0)
