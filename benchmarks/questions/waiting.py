"""Callers that wait for results that do not come."""

from __future__ import annotations

from benchmarks.database import Statistics
from benchmarks.peers import Lab
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "Queries per second on the database while callers wait in get()"


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Threads of one process wait; the database counts the transactions.

    django-celery-results is left out: each of its threads has a connection of its own.
    """
    callers = plan.pick(full=1000, short=1000, quick=50)
    seconds = plan.pick(full=20.0, short=10.0, quick=3.0)
    for name in lab.chosen(("pgbarrier", "database")):
        peer = lab.peer(name)
        peer.producer.call("ping")
        assert peer.database
        statistics = Statistics(peer.database)
        statistics.settle()
        before = statistics.read()
        found = peer.producer.call("wait_for_nothing", callers=callers, seconds=seconds)
        statistics.settle()
        spent = statistics.read() - before
        label = f"{callers:,} callers: "
        book.add(label + "queries", name, "/s", spent["transactions"] / found["seconds"])
        book.add(label + "processor of the caller", name, "%",
                 100 * found["cpu"] / found["seconds"])  # fmt: skip
        if found["failed"] or found["left"] or found["seconds"] > seconds * 1.5:
            book.note(f"{name}: {found['failed']} callers failed, {found['left']} were left, "
                      f"{found['seconds']:.0f} s for {seconds:.0f}: {found['errors']}")  # fmt: skip
