"""The questions, by the names under which they are asked; each has a TITLE and ``run``."""

from __future__ import annotations

from typing import Protocol

from benchmarks.peers import Lab
from benchmarks.plan import Plan
from benchmarks.questions import (
    barrier,
    bloat,
    chains,
    chord,
    counts,
    dispatch,
    expiry,
    get,
    large,
    reaper,
    sql,
    storm,
    throughput,
    waiting,
)
from benchmarks.records import Book


class Question(Protocol):
    """A module of this package."""

    TITLE: str

    def run(self, lab: Lab, plan: Plan, book: Book) -> None:
        """Ask it, and take down in ``book`` what was found."""
        ...


QUESTIONS: dict[str, Question] = {
    "chord": chord,
    "storm": storm,
    "throughput": throughput,
    "chains": chains,
    "get": get,
    "waiting": waiting,
    "barrier": barrier,
    "sql": sql,
    "counts": counts,
    "reaper": reaper,
    "expiry": expiry,
    "bloat": bloat,
    "dispatch": dispatch,
    "large": large,
}
