"""How much a run asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Plan:
    """The questions of a run and their extent.

    ``quick`` shows that a question works; ``short`` is for a run of all questions in one go.
    """

    questions: tuple[str, ...]
    rounds: int = 3
    quick: bool = False
    short: bool = False

    def pick(self, full: T, short: T, quick: T) -> T:
        """The value for the extent of this run."""
        return quick if self.quick else short if self.short else full


def final() -> Plan:
    """All that matters, in about twenty minutes of a quiet machine with two processors."""
    return Plan(
        questions=(
            "chord", "storm", "throughput", "get", "waiting", "barrier", "sql", "counts",
            "reaper", "expiry", "bloat", "dispatch", "large",
        ),
        rounds=5,
        short=True,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Plan]] = {"final": final}
