"""What was measured, and the tables that are made of it."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

BASE = "redis"

STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "max": max,
    "p95": lambda values: quantile(values, 0.95),
    "p99": lambda values: quantile(values, 0.99),
}


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


@dataclass
class Measure:
    """The samples of one peer, round by round; ``unit`` is seconds, ms, MB, bytes, .../s or none.

    Ratios are to the peer ``base``.
    """

    question: str
    label: str
    peer: str
    unit: str
    statistic: str = "median"
    base: str = BASE
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def value(self) -> float:
        """The statistic over the samples of all rounds."""
        return STATISTICS[self.statistic]([v for part in self.rounds for v in part])

    @property
    def by_round(self) -> list[float]:
        """The statistic of each round: what its spread is taken of."""
        return [STATISTICS[self.statistic](part) for part in self.rounds]


@dataclass
class Book:
    """All that a run has found."""

    machine: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    measures: list[Measure] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    question: str = ""

    def add(
        self,
        label: str,
        peer: str,
        unit: str,
        samples: float | Sequence[float],
        statistic: str = "median",
        base: str = BASE,
    ) -> None:
        """Take down one round's samples for the present question."""
        part = [samples] if isinstance(samples, (int, float)) else list(samples)
        for known in self.measures:
            if (known.question, known.label, known.peer) == (self.question, label, peer):
                known.rounds.append(part)
                return
        self.measures.append(Measure(self.question, label, peer, unit, statistic, base, [part]))

    @contextmanager
    def guard(self, peer: str) -> Iterator[None]:
        """Take down a peer's failure, which does not stop the others."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append((self.question, f"{peer}: {type(error).__name__}: {error}"))

    def note(self, text: str) -> None:
        """Take down what numbers do not say."""
        self.notes.append((self.question, text))

    def encode(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    @classmethod
    def decode(cls, values: dict[str, Any]) -> Book:
        measures = [Measure(**measure) for measure in values.pop("measures")]
        return cls(**{**values, "measures": measures})


# -- tables


def shown(value: float, unit: str) -> str:
    """A figure with its unit, as short as its precision allows."""
    if unit == "s" and abs(value) < 1:
        value, unit = value * 1000, "ms"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    text = f"{value:,.{digits}f}"
    return f"{text} {unit}" if unit else text


def cell(measure: Measure | None, base: Measure | None) -> str:
    """A figure, the lowest and highest round, and the ratio to the base."""
    if measure is None:
        return "-"
    text = shown(measure.value, measure.unit)
    rounds = measure.by_round
    if len(rounds) > 1:
        low, high = (shown(v, measure.unit) for v in (min(rounds), max(rounds)))
        text += f" ({low} … {high})"
    if base is not None and base is not measure and base.value:
        text += f" = {measure.value / base.value:.2f} x"
    return text


def table(book: Book, question: str) -> list[list[str]]:
    """The rows of a question's table, the head first: one row a label, one column a peer."""
    measures = [m for m in book.measures if m.question == question]
    peers = list(dict.fromkeys(m.peer for m in measures))
    rows = [["", *peers]]
    for label in dict.fromkeys(m.label for m in measures):
        of_label = {m.peer: m for m in measures if m.label == label}
        base = of_label.get(next(iter(of_label.values())).base)
        rows.append([label, *(cell(of_label.get(peer), base) for peer in peers)])
    return rows


def as_text(rows: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(rows: list[list[str]]) -> str:
    """A table for a page of documentation."""
    head, *others = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *others])
