"""One chord at a time."""

from __future__ import annotations

from benchmarks.peers import CHORDS, SLOW, Lab
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "Chords one after the other: the call, call to body, last member to body"
LABELS = {"call": "the call", "total": "call to body", "last": "last member to body"}


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Take turns over the sizes; small chords several times a turn, large ones in few rounds."""
    rounds = plan.rounds
    few = max(1, round(rounds * 0.4))
    sizes = plan.pick(  # size: chords a turn, rounds, rounds of the peers that poll
        full={10: (20, rounds, rounds), 100: (5, rounds, rounds), 1000: (2, rounds, rounds),
              10000: (1, few, 1)},
        short={10: (20, rounds, rounds), 100: (5, rounds, rounds), 1000: (1, rounds, few),
               10000: (1, few, 0)},
        quick={10: (5, rounds, rounds), 100: (2, rounds, rounds)},
    )  # fmt: skip
    for size, (count, turns, slow) in sizes.items():
        for peer in lab.turns(CHORDS, turns, slow):
            with book.guard(peer.name):
                often = max(1, count // 4) if peer.name in SLOW else count
                found = peer.call("chords", size=size, count=often)
                for key, label in LABELS.items():
                    values = [each[key] for each in found]
                    book.add(f"{size:,}: {label}", peer.name, "s", values)
                    if key == "last" and count > 1:
                        book.add(f"{size:,}: {label}, p99", peer.name, "s", values, "p99")
