"""What a run of a sweep did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

#: Failures that a run keeps the text of; the others are only counted.
_MOST_TEXTS = 100


class Stop(str, Enum):
    """Why a run ended before there was nothing left to do."""

    DISABLED = "disabled"
    BUSY = "busy"
    LOST_TURN = "lost its turn"
    ABORTED = "aborted"
    MAX_BATCHES = "max_batches"
    MAX_SECONDS = "max_seconds"
    MAX_FAILED = "max_failed"
    TIMEOUTS = "timeouts"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True)
class Failure:
    """A row that could not be handled: its key and what went wrong."""

    key: tuple[Any, ...]
    error: str


@dataclass
class Counts:
    """What a run did.

    ``batches`` that did something, ``rows`` handled, ``failed`` rows (the first of them in
    ``failures``), ``left`` rows that still match the filter (counted up to 10,000), ``seconds``,
    ``rules`` (rows by rule, for :class:`~celery_pgbarrier.sweeps.Revive`), and why the run
    ``stopped`` before the end, None where it did not.
    """

    batches: int = 0
    rows: int = 0
    failed: int = 0
    left: int = 0
    seconds: float = 0.0
    stopped: Stop | None = None
    rules: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def fail(self, key: tuple[Any, ...], error: BaseException) -> None:
        """Count a row that could not be handled."""
        self.failed += 1
        if len(self.failures) < _MOST_TEXTS:
            self.failures.append(Failure(key, _text(error)))

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values, as the result of the sweep's task."""
        values = asdict(self)
        values["stopped"] = self.stopped.value if self.stopped else None
        values["seconds"] = round(self.seconds, 3)
        values["failures"] = [
            {"key": [str(part) for part in failure.key], "error": failure.error}
            for failure in self.failures
        ]
        return values

    def __str__(self) -> str:
        parts = [f"{self.rows} rows in {self.batches} batches, {self.seconds:.1f} s"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.left:
            parts.append(f"{self.left} left")
        if self.stopped:
            parts.append(f"stopped: {self.stopped.value}")
        return ", ".join(parts)


def _text(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    first = next(iter(str(cause).strip().splitlines()), "")
    return f"{type(cause).__name__}: {first}" if first else type(cause).__name__
