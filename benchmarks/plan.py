"""How much a run asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Plan:
    """The questions of a run and their extent.

    ``quick`` shows that a question works; ``short`` is for a run of all questions in one go.
    ``budget`` has the seconds after which a question begins no further round; questions that are
    reached after ``minutes`` are left out.
    """

    questions: tuple[str, ...]
    rounds: int = 3
    quick: bool = False
    short: bool = False
    budget: dict[str, float] = field(default_factory=dict)
    minutes: float = 24 * 60.0

    def seconds(self, question: str) -> float:
        """The budget of a question."""
        return self.budget.get(question, 24 * 3600.0)

    def slow(self, rounds: int) -> int:
        """In how many of ``rounds`` the peers that poll take part."""
        return self.pick(rounds, max(1, rounds // 2), rounds)

    def pick(self, full: T, short: T, quick: T) -> T:
        """The value for the extent of this run."""
        return quick if self.quick else short if self.short else full


#: Seconds by question; about one and a half times what a quiet machine with two processors takes.
_BUDGET = {
    "chord": 360, "throughput": 210, "chains": 80, "storm": 120, "get": 130, "barrier": 160,
    "sql": 100, "dispatch": 160, "large": 240, "counts": 110, "reaper": 150, "expiry": 120,
    "waiting": 90, "bloat": 90,
}  # fmt: skip


def final() -> Plan:
    """All that matters, in about half an hour of a quiet machine with two processors."""
    return Plan(questions=tuple(_BUDGET), rounds=8, short=True, budget=dict(_BUDGET), minutes=40)


PRESETS: dict[str, Callable[[], Plan]] = {"final": final}
