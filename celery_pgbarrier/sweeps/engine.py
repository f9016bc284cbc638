"""The loop that all periodic deletes and updates share: a batch, its commit, and again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from celery_pgbarrier.store.trouble import is_transient, sqlstate
from celery_pgbarrier.sweeps.counts import Counts, Stop

logger = logging.getLogger(__name__)

#: lock_not_available and query_canceled: the batch was too much for the moment.
_TIMEOUTS = {"55P03", "57014"}
#: Batches without trouble after which a halved size is doubled again.
_CALM = 5
#: Timeouts in a row, once the batch is down to one row, after which the run ends.
_MOST_TIMEOUTS = 3
#: How often a pause looks whether to stop (seconds).
_SLICE = 0.1


@dataclass(frozen=True)
class Limits:
    """How far a run goes.

    Parameters:
        batch_size: rows per batch, halved after a lock or statement timeout.
        max_batches: batches per run; None for all there is.
        max_seconds: no batch begins later than so many seconds after the beginning.
        max_failed: the run ends once so many rows have failed.
        pause: seconds between two batches.
        retries: how often trouble that passes (a lost connection, a deadlock) is tried again.
    """

    batch_size: int
    max_batches: int | None = None
    max_seconds: float | None = None
    max_failed: int | None = None
    pause: float = 0.0
    retries: int = 0


@dataclass(frozen=True)
class Batch:
    """What a committed batch did; ``more`` tells whether there may be further rows."""

    rows: int
    more: bool
    stop: Stop | None = None


class BatchSize:
    """The size of the next batch: halved by timeouts, doubled back when it is calm."""

    def __init__(self, full: int) -> None:
        self.full = self.now = full
        self._calm = 0
        self._timeouts = 0

    def timed_out(self) -> bool:
        """Halve the size; False where even one row has timed out again and again."""
        self._calm = 0
        self._timeouts = self._timeouts + 1 if self.now == 1 else 0
        self.now = max(1, self.now // 2)
        return self._timeouts < _MOST_TIMEOUTS

    def went_well(self) -> None:
        """Count a batch without trouble."""
        self._calm += 1
        self._timeouts = 0
        if self.now < self.full and self._calm >= _CALM:
            self.now, self._calm = min(self.full, self.now * 2), 0


def run_batches(
    step: Callable[[int], Batch],
    limits: Limits,
    counts: Counts,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[Counts], None] = lambda counts: None,
    begun: float | None = None,
) -> None:
    """Call *step* with a batch size until there is nothing left or a limit is reached.

    Each step picks its rows anew from the top and commits by itself; one that raised has
    committed nothing.

    Parameters:
        counts: added to; ``stopped`` tells which limit ended the loop.
        stop: asked before each batch; true ends the loop.
        report: called after each batch.
        begun: when ``max_seconds`` began to count (:func:`time.monotonic`); now, by default.

    Raises:
        Exception: what a step raised, other than trouble that passes and timeouts.
    """
    size, done = BatchSize(limits.batch_size), 0
    begun = time.monotonic() if begun is None else begun
    while True:
        counts.stopped = _reached(limits, counts, done, begun, stop)
        if counts.stopped:
            return
        batch = _persist(step, size, limits.retries, counts)
        if batch is None:
            return
        done += 1
        counts.batches += batch.rows > 0
        counts.rows += batch.rows
        report(counts)
        if batch.stop or not batch.more:
            counts.stopped = batch.stop
            return
        pause(limits.pause, stop)


def _reached(
    limits: Limits, counts: Counts, done: int, begun: float, stop: Callable[[], bool]
) -> Stop | None:
    if stop():
        return Stop.SHUTDOWN
    if limits.max_batches is not None and done >= limits.max_batches:
        return Stop.MAX_BATCHES
    if limits.max_seconds is not None and time.monotonic() - begun >= limits.max_seconds:
        return Stop.MAX_SECONDS
    if limits.max_failed is not None and counts.failed >= limits.max_failed:
        return Stop.MAX_FAILED
    return None


def _persist(
    step: Callable[[int], Batch], size: BatchSize, retries: int, counts: Counts
) -> Batch | None:
    """Do one batch, smaller or later where it must be; None where it times out for good."""
    tries = 0
    while True:
        try:
            batch = step(size.now)
        except Exception as error:
            if _timed_out(error):
                logger.warning("A batch of %s rows timed out, trying fewer", size.now)
                if size.timed_out():
                    continue
                counts.stopped = Stop.TIMEOUTS
                return None
            tries += 1
            if not is_transient(error) or tries > retries:
                raise
            logger.warning("A batch is tried again: %r", error)
            pause(min(0.1 * 2**tries, 5.0), lambda: False)
        else:
            size.went_well()
            return batch


def _timed_out(error: BaseException) -> bool:
    """Tell a lock or statement timeout, also behind the error of our own database layer."""
    cause = error if isinstance(error, DBAPIError) else error.__cause__
    return isinstance(cause, DBAPIError) and sqlstate(cause) in _TIMEOUTS


def pause(seconds: float, stop: Callable[[], bool]) -> None:
    """Wait, but not for long once *stop* says so."""
    end, event = time.monotonic() + seconds, threading.Event()
    while (left := end - time.monotonic()) > 0 and not stop():
        event.wait(min(left, _SLICE))
