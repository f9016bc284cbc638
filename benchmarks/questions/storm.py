"""Many chords at once."""

from __future__ import annotations

from benchmarks.peers import CHORDS, Lab
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "Many chords of 10 at once: chords per second until the last body starts"


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Call them all, then wait for all bodies."""
    count = plan.pick(full=300, short=300, quick=30)
    rounds = plan.pick(plan.rounds, max(1, plan.rounds - 2), 1)
    for peer in lab.turns(CHORDS, rounds, plan.slow(rounds)):
        with book.guard(peer.name):
            found = peer.call("storm", count=count, size=10)
            book.add(f"{count} of 10: completed", peer.name, "/s", count / found["total"])
            book.add(f"{count} of 10: called", peer.name, "/s", count / found["call"])
