"""Results as their callers wait for them."""

from __future__ import annotations

from benchmarks.peers import CHORDS, Lab
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "get() of a task of 1 ms, and join of results that are finished"


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """One caller at a time."""
    slow = plan.pick(full=30, short=12, quick=4)
    for peer in lab.turns(CHORDS, plan.rounds, plan.slow(plan.rounds)):
        with book.guard(peer.name):
            count = slow if peer.name == "django" else slow * 5
            took = peer.call("latency", count=count)
            book.add("get(), p50", peer.name, "s", took)
            book.add("get(), p95", peer.name, "s", took, "p95")
    for size in plan.pick(full=(500, 1000), short=(500, 1000), quick=(100,)):
        rounds = plan.pick(plan.rounds, 3, 1)
        for peer in lab.turns(CHORDS, rounds, plan.slow(rounds)):
            with book.guard(peer.name):
                took = peer.call("join", count=size)
                book.add(f"join of {size:,} finished results", peer.name, "s", took)
