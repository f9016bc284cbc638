"""The reaper and the purge, run and explained in a process of our peer's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import psycopg2.extensions
import sqlalchemy as sa

from benchmarks.app import app

#: What EXPLAIN shows of an update, and none of its effects.
EXPLAIN = "EXPLAIN (ANALYZE, BUFFERS, WAL, FORMAT JSON) "
EXPLAINED = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")
#: Rows that are read faster from end to end than by an index.
FEW = 500


class Watched(psycopg2.extensions.cursor):
    """A cursor that tells of each statement, by whichever way it came."""

    spent = 0.0
    plans: list[dict[str, Any]] | None = None

    def execute(self, query: Any, parameters: Any = None) -> None:
        """Run a statement and add up how long it took, or explain it first."""
        if Watched.plans is not None and query.split(None, 1)[0].upper() in EXPLAINED:
            Watched.plans.append(_explain(self.connection, query, parameters))
        begun = time.perf_counter()
        try:
            super().execute(query, parameters)
        finally:
            Watched.spent += time.perf_counter() - begun


def _watch(connection: Any, *_: Any) -> None:
    connection.cursor_factory = Watched


def _pass() -> str:
    """One pass of the reaper on connections that are watched; what it did."""
    from celery_pgbarrier import reaper

    engine = app.backend.database.engine()
    if not sa.event.contains(engine, "checkout", _watch):
        app.backend.database.dispose()  # a connection that is kept would not be watched
        sa.event.listen(engine, "checkout", _watch)
    return repr(reaper.run_once(app.backend))


def reap() -> dict[str, Any]:
    """One pass of the reaper: seconds, seconds of statements, what it did."""
    Watched.spent, begun = 0.0, time.perf_counter()
    counts = _pass()
    return {"seconds": time.perf_counter() - begun, "database": Watched.spent, "counts": counts}


def explain_reap() -> list[dict[str, Any]]:
    """One pass of the reaper, each statement explained just before it runs."""
    Watched.plans = plans = []
    try:
        _pass()
    finally:
        Watched.plans = None
    assert plans, "no statement was seen"
    return plans


def _explain(connection: Any, statement: str, parameters: Any) -> dict[str, Any]:
    cursor = connection.cursor(cursor_factory=psycopg2.extensions.cursor)
    idle = connection.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE
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


def _sequential(plan: dict[str, Any], limited: bool = False) -> list[str]:
    """What a plan has read from end to end, tables or indexes; those of a few rows left out.

    An index without a condition on it is read from its beginning to where enough has been found:
    below a LIMIT only the rows count that were read in vain.
    """
    found = []
    kind = plan["Node Type"]
    limited = limited or kind == "Limit"
    if kind == "Seq Scan" or (kind.startswith("Index") and "Index Cond" not in plan):
        read = plan.get("Rows Removed by Filter", 0)
        read += 0 if limited else plan.get("Actual Rows", 0)
        if read * plan.get("Actual Loops", 0) > FEW:
            found.append(plan.get("Index Name") or plan["Relation Name"])
    for part in plan.get("Plans", ()):
        found += _sequential(part, limited)
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
