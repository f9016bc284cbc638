"""What a scenario left behind: open rows, rows that no purge takes, counters, messages."""

from __future__ import annotations

from contextlib import suppress

import redis
from celery import Celery

from celery_pgbarrier import reaper
from tests.chaos.stage import Stage
from tests.support.waiting import wait_until

OPEN = """
SELECT 'task ' || id || ' (' || coalesce(name, '?') || ') is ' || state || ', attempt ' || attempt
       || ', crashes ' || crashes || ', due ' || coalesce(CAST(due_at AS text), 'never') AS line
  FROM pgbarrier_task WHERE state NOT IN ('done', 'untracked') OR message IS NOT NULL
UNION ALL
SELECT 'barrier ' || id || ' is ' || state FROM pgbarrier_barrier
 WHERE state NOT IN ('released', 'failed') OR open_slots <> 0
"""

EXPIRING = """
SELECT table_name AS name FROM information_schema.columns
 WHERE column_name = 'expires_at' AND table_name LIKE 'pgbarrier%'
"""

#: What goes without an expiry of its own.
UNDATED = ("pgbarrier_slot", "pgbarrier_dispatch")


def open_rows(stage: Stage) -> list[str]:
    """Our rows that have not come to their end."""
    return [row.line for row in stage.query(OPEN)] if stage.arena.kind.ours else []


def left(stage: Stage) -> list[str]:
    """What is left behind, a line each. Our finished rows are made to expire, and purged."""
    found = [f"{count} messages in the broker" for count in [stage.messages()] if count]
    name = stage.arena.kind.name
    if name == "redis":
        with redis.Redis.from_url(stage.arena.results.url()) as client:
            keys = [key.decode() for mark in "jts" for key in client.scan_iter(f"*.{mark}")]
        found += [f"key {key}" for key in sorted(keys)]
    elif name == "ours":
        found += open_rows(stage) + _unpurged(stage)
    return found


def _unpurged(stage: Stage) -> list[str]:
    tables = [row.name for row in stage.query(EXPIRING)]
    for table in tables:
        stage.query(f"UPDATE {table} SET expires_at = 'epoch' WHERE expires_at IS NOT NULL")
    counts: dict[str, int] = {}

    def purged() -> bool:
        """Purge; what a worker's reaper is purging at that moment is gone a moment later."""
        _purge(stage)
        for table in [*tables, *UNDATED]:
            counts[table] = stage.query(f"SELECT count(*) FROM {table}")[0][0]
        return not any(counts.values())

    with suppress(AssertionError):
        wait_until(purged, 5.0)
    return [
        f"{count} rows of {table} outlive their purge" for table, count in counts.items() if count
    ]


def _purge(stage: Stage) -> None:
    app = Celery("chaos", backend=stage.backend(), set_as_current=False)
    app.conf.update(stage.settings())
    try:
        reaper.purge(app.backend)
    finally:
        app.backend.database.dispose()
        app.close()
