"""One chord at a time."""

from __future__ import annotations

from benchmarks.peers import CHORDS, Lab
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "Chords one after the other: the call, call to body, last member to body"

LABELS = {"call": "the call", "total": "call to body", "last": "last member to body"}


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Take turns over the sizes; small chords several times a turn, large ones in few rounds."""
    sizes = plan.pick(
        full={10: (20, 1.0), 100: (5, 1.0), 1000: (2, 1.0), 10000: (1, 0.4)},
        short={10: (20, 1.0), 100: (5, 1.0), 1000: (1, 1.0), 10000: (1, 0.4)},
        quick={10: (5, 1.0), 100: (2, 1.0)},
    )
    for size, (count, share) in sizes.items():
        rounds = max(1, round(plan.rounds * share))
        for peer in lab.turns(CHORDS, rounds):
            with book.guard(peer.name):
                found = peer.call("chords", size=size, count=count)
                for key, label in LABELS.items():
                    values = [each[key] for each in found]
                    book.add(f"{size:,}: {label}", peer.name, "s", values)
                    if key == "last" and count > 1:
                        book.add(f"{size:,}: {label}, p99", peer.name, "s", values, "p99")
