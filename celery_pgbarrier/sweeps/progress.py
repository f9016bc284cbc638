"""How a run tells how far it is: to the log, to the task's state, as a bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from celery_pgbarrier.sweeps.counts import Counts

logger = logging.getLogger(__name__)

Report = Callable[[Counts], None]
#: Seconds between two lines in the log.
_LOG_EVERY = 10.0
#: Seconds between two updates of the task's state.
_STATE_EVERY = 1.0


class _NowAndThen:
    """Lets a call through at most once an interval (seconds)."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self._last < self._interval:
            return False
        self._last = time.monotonic()
        return True


class Log:
    """Writes a line every ten seconds."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = _NowAndThen(_LOG_EVERY)

    def __call__(self, counts: Counts) -> None:
        """Report the counts so far."""
        if self._turn.due():
            logger.info("Sweep %s goes on: %s", self._name, counts)


class TaskState:
    """Sets the state of the running task to PROGRESS, with the counts as its meta."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self._turn = _NowAndThen(_STATE_EVERY)

    def __call__(self, counts: Counts) -> None:
        """Report the counts so far."""
        if self._turn.due() and self._task.request.id and not self._task.request.is_eager:
            self._task.update_state(state="PROGRESS", meta=counts.as_dict())


class Bar:
    """Moves a :func:`click.progressbar`."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._done = 0

    def __call__(self, counts: Counts) -> None:
        """Report the counts so far."""
        done = counts.rows + counts.failed
        self._bar.update(done - self._done)
        self._done = done


def each(reports: Sequence[Report]) -> Report:
    """Return what calls every one of them."""

    def report(counts: Counts) -> None:
        for one in reports:
            one(counts)

    return report
