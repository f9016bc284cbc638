"""Looks at results, shared by the threads of a process.

Who waits for results looks again and again. Moments to look at lie on a grid, so that threads (or
greenlets) that wait at the same time look at the same moments: the first of them asks for all.
NOTIFY would not do: it takes one lock of the whole server at each commit that notifies, and
PgBouncer in transaction mode cannot listen.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from celery_pgbarrier.errors import PgBarrierError

#: The shortest pause between looks, which is the unit of the grid (seconds).
FIRST_PAUSE = 0.002
#: A pause is at least this part of the time that was waited for so far,
_OF_AGE = 0.125
#: and at least this many times what the last look took.
_OF_LOOK = 4.0

Fetch = Callable[[Sequence[str]], Iterable[Any]]


def pause(age: float, took: float, interval: float) -> float:
    """Return how long to wait until the next look, in seconds.

    Parameters:
        age: seconds that were waited for so far.
        took: seconds that the last look took.
        interval: the longest pause that the caller wants.
    """
    return max(min(max(FIRST_PAUSE, age * _OF_AGE, took * _OF_LOOK), interval), FIRST_PAUSE)


def moment(now: float, wait: float) -> int:
    """Return the last moment of the grid within *wait* seconds, in units of the grid.

    The grid is as wide as the largest power of two in *wait*, so that the moments of a wide grid
    are moments of all narrower ones.
    """
    units = max(int(wait / FIRST_PAUSE), 1)
    width = 1 << (units.bit_length() - 1)
    return int((now / FIRST_PAUSE + units) // width) * width


class _Round:
    """One look: what is looked for, and what was found."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.done = threading.Event()
        self.rows: dict[str, Any] = {}
        self.error: PgBarrierError | None = None


class Looks:
    """The looks of one process at one database; ``took`` is what the last one took (seconds)."""

    def __init__(self) -> None:
        self.took = 0.0
        self._lock = threading.Lock()
        self._rounds: dict[int, _Round] = {}
        self._pid = os.getpid()

    def look(self, fetch: Fetch, ids: Sequence[str], at: int) -> list[Any]:
        """Wait for a moment of the grid and look, together with all who look then.

        Parameters:
            fetch: returns the rows, each with an ``id``, of those ids that have a result.
            at: the moment, see :func:`moment`.

        Raises:
            PgBarrierError: PostgreSQL could not be asked.
        """
        if self._pid != os.getpid():  # the leaders of the rounds are threads of the parent
            self._lock, self._rounds, self._pid = threading.Lock(), {}, os.getpid()
        with self._lock:
            leading = at not in self._rounds
            found = self._rounds.setdefault(at, _Round())
            found.ids.update(ids)
        if leading:
            self._lead(fetch, found, at)
        else:
            found.done.wait()
        if found.error is not None:
            raise found.error
        return [found.rows[task_id] for task_id in ids if task_id in found.rows]

    def _lead(self, fetch: Fetch, found: _Round, at: int) -> None:
        try:
            time.sleep(max(at * FIRST_PAUSE - time.monotonic(), 0.0))
            self._close(found, at)
            began = time.monotonic()
            found.rows = {row.id: row for row in fetch(list(found.ids))}
            self.took = time.monotonic() - began
        except PgBarrierError as error:
            found.error = error
        finally:  # a leader that is killed leaves the others without a row: they look again
            self._close(found, at)
            found.done.set()

    def _close(self, found: _Round, at: int) -> None:
        """Let nobody join a round any more."""
        with self._lock:
            if self._rounds.get(at) is found:
                del self._rounds[at]
