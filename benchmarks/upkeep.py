"""The reaper and the purge, run and explained in a process of our peer's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from benchmarks.app import app

#: What EXPLAIN shows of an update, and none of its effects.
EXPLAIN = "EXPLAIN (ANALYZE, BUFFERS, WAL, FORMAT JSON) "
#: Rows that are read faster from end to end than by an index.
FEW = 500


def reap() -> dict[str, Any]:
    """One pass of the reaper: seconds, seconds of statements, what it did."""
    from celery_pgbarrier import reaper

    engine, spent = app.backend.database.engine(), [0.0, 0.0]

    def before(*_: Any) -> None:
        spent[0] = time.perf_counter()

    def after(*_: Any) -> None:
        spent[1] += time.perf_counter() - spent[0]

    sa.event.listen(engine, "before_cursor_execute", before)
    sa.event.listen(engine, "after_cursor_execute", after)
    begun = time.perf_counter()
    counts = reaper.run_once(app.backend)
    took = time.perf_counter() - begun
    sa.event.remove(engine, "before_cursor_execute", before)
    sa.event.remove(engine, "after_cursor_execute", after)
    return {"seconds": took, "database": spent[1], "counts": repr(counts)}


def explain_reap() -> list[dict[str, Any]]:
    """One pass of the reaper, each statement explained just before it runs."""
    from celery_pgbarrier import reaper

    engine, plans = app.backend.database.engine(), []

    def before(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.split(None, 1)[0].upper() in ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH"):
            plans.append(_explain(connection.connection, statement, parameters))

    sa.event.listen(engine, "before_cursor_execute", before)
    try:
        reaper.run_once(app.backend)
    finally:
        sa.event.remove(engine, "before_cursor_execute", before)
    return plans


def _explain(connection: Any, statement: str, parameters: Any) -> dict[str, Any]:
    cursor = connection.cursor()
    idle = connection.dbapi_connection.info.transaction_status == 0
    cursor.execute("BEGIN" if idle else "SAVEPOINT explained")
    cursor.execute(EXPLAIN + statement, parameters)
    answer = cursor.fetchone()[0]
    cursor.execute("ROLLBACK" if idle else "ROLLBACK TO SAVEPOINT explained")
    tree = (json.loads(answer) if isinstance(answer, str) else answer)[0]
    top = tree["Plan"]
    buffers = sum(top.get(f"Shared {kind} Blocks", 0) for kind in ("Hit", "Read"))
    return {
        "statement": " ".join(statement.split())[:90],
        "ms": tree["Planning Time"] + tree["Execution Time"],
        "buffers": buffers,
        "sequential": sorted(set(_sequential(top))),
    }


def _sequential(plan: dict[str, Any]) -> list[str]:
    """The relations that a plan has read from end to end, those of a few rows left out."""
    found = []
    if plan["Node Type"] == "Seq Scan":
        read = plan.get("Actual Rows", 0) + plan.get("Rows Removed by Filter", 0)
        if read * plan.get("Actual Loops", 0) > FEW:
            found.append(plan["Relation Name"])
    for part in plan.get("Plans", ()):
        found += _sequential(part)
    return found


def cleanup() -> float:
    """Delete what has expired, as ``celery.backend_cleanup`` does; seconds."""
    begun = time.perf_counter()
    app.backend.cleanup()
    return time.perf_counter() - begun


def beat() -> None:
    """Register this process as a worker that lives."""
    from celery_pgbarrier import lease

    lease.beat(app.backend)


def store_one() -> None:
    """Store one result, of which others can be made."""
    app.backend.store_result("seed", 1, "SUCCESS")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (reap, explain_reap, cleanup, beat, store_one)
}
