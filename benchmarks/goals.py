"""What this package means to reach, and whether a run shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.records import Book, Measure, shown


@dataclass(frozen=True)
class Goal:
    """A bound for a figure, or for its ratio to the base.

    ``label`` is that of the figure; one that begins with a colon or comma is its end.
    """

    question: str
    label: str
    most: float | None = None
    least: float | None = None
    ratio: bool = True
    peer: str = "pgbarrier"

    def rows(self, book: Book) -> Iterator[list[str]]:
        """What the run shows: figure, bound, whether it is met."""
        for measure in book.measures:
            if (measure.question, measure.peer) != (self.question, self.peer):
                continue
            if measure.label == self.label or (
                self.label[0] in ":," and measure.label.endswith(self.label)
            ):
                yield self._judged(book, measure)

    def _judged(self, book: Book, measure: Measure) -> list[str]:
        name, value, seen = f"{measure.question}, {measure.label}", measure.value, ""
        if self.ratio:
            base = _base(book, measure)
            if base is None or not base.value:
                return [name, self._bound(measure), "not measured", ""]
            value /= base.value
            seen = f"{value:.2f} x {measure.base}"
        else:
            seen = shown(value, measure.unit)
        met = (self.most is None or value <= self.most) and (
            self.least is None or value >= self.least
        )
        return [name, self._bound(measure), seen, "yes" if met else "**no**"]

    def _bound(self, measure: Measure) -> str:
        sign = "≤" if self.most is not None else "≥"
        bound = self.most if self.most is not None else self.least
        assert bound is not None
        return f"{sign} {bound:g} x" if self.ratio else f"{sign} {shown(bound, measure.unit)}"


GOALS = (
    Goal("chord", "10: call to body", most=1.3),
    Goal("chord", "100: call to body", most=1.3),
    Goal("chord", "1,000: call to body", most=1.0),
    Goal("chord", "10,000: call to body", most=1.0),
    Goal("chord", "10: last member to body", most=2.0),
    Goal("chord", "100: last member to body", most=2.0),
    Goal("chord", "10,000: last member to body", most=1.0),
    Goal("storm", ": completed", least=0.9),
    Goal("throughput", "run from a full queue", least=0.95),
    Goal("throughput", "called and run at once", least=0.95),
    Goal("get", "get(), p95", most=0.010, ratio=False),
    Goal("get", "join of 500 finished results", most=1.0),
    Goal("barrier", "4 processes", least=1.0),
    Goal("barrier", "16 processes", least=1.0),
    Goal("sql", "64 connections", least=0.5, peer="counted by us"),
    # Two that are flushed, dispatch included, and the claim, which is not.
    Goal("counts", ": transactions", most=3.0, ratio=False),
    Goal("reaper", ", nothing stale: statements", most=0.010, ratio=False),
    Goal("reaper", ", nothing stale: tables or indexes read from end to end", most=0, ratio=False),
    Goal("expiry", ": results deleted", least=0.7),
    Goal("expiry", "longest lock wait of the writer", most=0.050, ratio=False),
    Goal("dispatch", ": the call", most=1.1),
    Goal("dispatch", ": peak memory", most=1.0),
    Goal("large", ": peak memory of the producer", most=1024, ratio=False),
    Goal("large", ": peak memory of the worker's parent", most=1024, ratio=False),
    Goal("large", ": peak memory of the largest child", most=1024, ratio=False),
    Goal("large", ": message of the body", most=65536, ratio=False),
)


def _base(book: Book, measure: Measure) -> Measure | None:
    for other in book.measures:
        key = (other.question, other.label, other.peer)
        if key == (measure.question, measure.label, measure.base):
            return other
    return None


def judged(book: Book) -> list[list[str]]:
    """The goals that the run has figures for, the head first."""
    rows = [row for goal in GOALS for row in goal.rows(book)]
    return [["", "goal", "measured", "met"], *rows]
