"""Chains: each task's outcome sends the next step."""

from __future__ import annotations

from benchmarks.peers import RESULTS, Lab
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "Chains of four steps, many at once: tasks per second until the last one ends"
STEPS = 4


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Chains are run while they are being called."""
    count = plan.pick(full=500, short=200, quick=30)
    for peer in lab.turns(RESULTS, plan.rounds, plan.slow(plan.rounds)):
        with book.guard(peer.name):
            rate = peer.call("chains", count=count, steps=STEPS)
            book.add(f"{count} chains: tasks", peer.name, "/s", rate)
