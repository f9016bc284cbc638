"""The claims of the demo, each against what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from examples.demo.counting import COUNTED, Figures
from examples.demo.ledger import Ledger


@dataclass(frozen=True)
class Check:
    claim: str
    expected: Any
    found: Any

    @property
    def holds(self) -> bool:
        return bool(self.expected == self.found)


def same_figures(report: Figures, expected: Figures) -> list[Check]:
    """The chord's report against that of a plain loop."""
    compared = ("files", "distinct files", *COUNTED, "packages")
    return [Check(f"{name}, as in the loop", expected[name], report[name]) for name in compared]


def once_each(ledger: Ledger, barrier: str, body: str, files: int) -> list[Check]:
    """Every member with one accepted outcome, and one run of the body, on record."""
    members = ledger.members(barrier)
    return [
        Check("members on record", files, members["ids"]),
        Check("members done, with one outcome", files, members["succeeded"]),
        Check("the barrier", "released", ledger.barrier_state(barrier)),
        Check("the body", "done", ledger.task_state(body)),
        Check("runs of the body, all told", 1, ledger.body_runs()),
    ]
