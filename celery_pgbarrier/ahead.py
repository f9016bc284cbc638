"""A busy worker claims what waits in it, and commits what its processes finish, in batches.

A claim and an outcome each cost a round trip, a statement to plan and, for an outcome, a flush;
eight in one statement cost little more than one.  So while messages of short tasks wait in a
prefork worker for a free process, its clerk (:mod:`celery_pgbarrier.clerk`) claims the next ones
ahead, and the processes leave the outcomes of their successes to the clerk, with the messages that
follow (a chain's next step): of what was claimed ahead, and of what they claimed themselves while
the worker still had nothing to wait.  All else (an idle worker, long tasks, retries, failures,
canvases that follow, late acknowledgement) goes the way for one task; so does whatever a batch
leaves out, and a claim that has grown older than a heartbeat is made sure of by the process before
it runs the task.

The message of a very short task is acknowledged when it is claimed: its row has all that the
broker knew, and the next message comes, which otherwise waits for a process to be free.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

from kombu.utils.encoding import ensure_bytes

from celery_pgbarrier import bulk
from celery_pgbarrier.clerk import LARGEST, Clerk, Grant, now
from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.lease import Attempt, boot
from celery_pgbarrier.unit import STAMP, Stamp, Unit

logger = logging.getLogger(__name__)

#: Tasks that take longer (seconds, on average) are not claimed ahead: it would save nothing, and a
#: claim that waits is one that a dead worker keeps for a lease.
_SHORT = 0.05
#: Messages of tasks that take less (seconds, on average) are acknowledged with their claim.
_BRIEF = 0.01
#: How much work is claimed ahead for a process at most: in seconds, and in tasks.
_WORK, _LARGEST = 0.05, 8
#: The weight of the last run in the average.
_LAST = 0.2
#: Tasks of which a process remembers that it left their outcomes: more than the socket holds.
_REMEMBERED = 10_000


# -- in a pool process


def attempt_from(
    field: Sequence[Any] | None, task_id: str, stamp: Stamp, longest: float
) -> Attempt | None:
    """Return the attempt that a request's grant stands for.

    Parameters:
        longest: seconds after which a grant must be made sure of (None is returned).
    """
    if not field or not _is_of(field, stamp) or not field[1] or now() - field[1] > longest:
        return None
    return Attempt(task_id, stamp, field[0], 1, field[2], Unit(stamp.call), ahead=True)


def token_from(field: Sequence[Any] | None, stamp: Stamp) -> str | None:
    """Return the token under which the clerk has claimed a task, or tried to."""
    return str(field[0]) if field and _is_of(field, stamp) else None


def _is_of(field: Sequence[Any], stamp: Stamp) -> bool:
    """Tell whether a grant is this worker's for this very message."""
    return tuple(field[3:]) == (boot.current(), stamp.seq)


def leave(unit: Unit, attempt: Attempt) -> bool:
    """Leave an outcome to the clerk of the worker; False where that cannot be, or is no use.

    Parameters:
        unit: the outcome, and messages that are to be sent with it.
    """
    if current is None or current.pid == os.getpid():
        return False
    if not attempt.ahead:  # its own claim: messages may have come since
        short = now() - attempt.claimed_at < _SHORT
        if not (short and current.clerk.waiting[0]):
            return False
    if not current.clerk.leave(unit):
        return False
    _left[attempt.task_id] = None
    _left.move_to_end(attempt.task_id)
    if len(_left) > _REMEMBERED:
        _left.popitem(last=False)
    return True


def has_left(task_id: str) -> bool:
    """Tell whether this process has left an outcome of a task, which may not be stored yet.

    Its claim stands until then, for this process too: another copy of the message is a duplicate.
    """
    return task_id in _left


#: Of this process; the oldest first.
_left: OrderedDict[str, None] = OrderedDict()


# -- in the worker's parent, in the thread of its event loop


class Ahead:
    """What waits in a worker for a process, and what of it is claimed.

    Parameters:
        most: messages per claiming statement.
        processes: of the pool.
    """

    def __init__(self, most: int, processes: int) -> None:
        self.pid = os.getpid()
        self.clerk = Clerk()
        self._most, self._processes = most, processes
        self._waiting: dict[Any, None] = {}
        self._granted: dict[Any, Grant] = {}
        self._takes: dict[str, float] = {}
        self._together, self._stopped = True, False
        self.clerk.quiet.set()

    def resume(self, together: bool) -> None:
        """Begin, or begin again with another connection to the broker.

        Parameters:
            together: whether acknowledgements may be written together.
        """
        self._together, self._stopped = together, False

    def received(self, request: Any) -> None:
        """Take note of a request that may have to wait for a process."""
        if self._stopped or not _eligible(request):
            return
        request.on_success = partial(self._succeeded, request)
        if self._takes_of(request) < _SHORT:
            self._waiting[request] = None
            # Where it has not to wait, this is undone at once.
            request.execute_using_pool = partial(self._execute, request)
            self._look()

    def _succeeded(self, request: Any, result: Any, **options: Any) -> Any:
        """Take note of how long a task took."""
        del request.on_success  # the class's own from here on; and a reference cycle less
        name, took = request.task.name, result[2]
        if took is not None:  # as it is where the task was ignored
            before = self._takes.get(name, took)
            self._takes[name] = before + _LAST * (took - before)
        return request.on_success(result, **options)

    def _execute(self, request: Any, pool: Any, **options: Any) -> Any:
        """Send a request to the pool, with its claim where there is one."""
        del request.execute_using_pool
        self._waiting.pop(request, None)
        grant = self._granted.pop(request, None)
        if grant is not None:
            request.hand_over(grant)
        self._look()
        return request.execute_using_pool(pool, **options)

    def _takes_of(self, request: Any) -> float:
        """Return how long a task of this kind takes (seconds)."""
        return self._takes.get(request.task.name, _SHORT)

    def _look(self) -> None:
        """Have the next batch claimed when it is time; tell whether more outcomes are to come."""
        if self.clerk.granted:
            self._acknowledge()
        waiting = len(self._waiting)
        self.clerk.waiting[0] = 1 if waiting or self._granted else 0
        if waiting >= 2 and not self.clerk.busy and self.clerk.claiming and self._few():
            requests = list(islice(self._waiting, self._most))
            for request in requests:
                del self._waiting[request]
                self._granted[request] = self._grant(request)
            self.clerk.claim([self._granted[request] for request in requests])
        if self.clerk.quiet.is_set() is bool(self._granted):
            (self.clerk.quiet.clear if self._granted else self.clerk.quiet.set)()

    def _acknowledge(self) -> None:
        """Acknowledge the messages of what is granted, written together where that can be."""
        requests = []
        while self.clerk.granted:
            request = self.clerk.granted.popleft()
            if not request.acknowledged:
                requests.append(request)
        together = bool(requests) and self._together
        if together and bulk.acknowledge([request.message for request in requests]):
            for request in requests:
                request.acknowledged = True
        for request in requests:
            try:
                request.acknowledge()  # as Celery does; nothing where it is done
            except Exception as error:  # whoever called has other things to finish
                logger.warning("Task %s is not acknowledged: %r", request.id, error)

    def _few(self) -> bool:
        """Tell whether few claims are left; early enough for many at once where many wait."""
        processes, left, waiting = self._processes, len(self._granted), len(self._waiting)
        if left < processes or waiting < 2 * processes:
            return left < processes
        if left < 2 * processes or waiting < 4 * processes:
            return left < 2 * processes
        takes = self._takes_of(next(iter(self._waiting)))
        each = min(_WORK / takes if takes else _LARGEST, _LARGEST)
        return left < min(each * processes, self._most)

    def _grant(self, request: Any) -> Grant:
        early = self._takes_of(request) < _BRIEF and not request.task.acks_late
        return Grant(
            request.id,
            request.stamp,
            request.task.name,
            partial(_envelope, request),
            self.clerk.token(),
            request if early else None,
        )

    def withdraw(self, patience: float) -> None:
        """Release what waits claimed: these messages go to whoever is there.

        The broker brings them again, but for those that were acknowledged: these are published.
        What still comes while the consumer stops is left to the broker.
        """
        self._stopped = True
        granted, self._granted = self._granted, {}
        self.clerk.granted = deque()  # what is being claimed is told to the one before
        for request in [*granted, *self._waiting]:
            del request.execute_using_pool
        self._waiting.clear()
        self.clerk.waiting[0] = 0
        self.clerk.quiet.set()
        if granted:
            gone = [request.id for request in granted if request.acknowledged]
            self.clerk.release(list(granted.values()), gone, patience)


#: The one of this worker; pool processes inherit it.
current: Ahead | None = None


def _eligible(request: Any) -> bool:
    """Tell whether a request is claimed ahead: one that may start as soon as a process is free."""
    task = request.task
    return not (
        request.eta is not None
        or task.rate_limit
        or request.content_type is None  # an older protocol, read already
        or "compression" in request.message.headers
        or not (request.stamp.recorded or len(request.body) <= LARGEST)
        or (task.track_started and not request.ignore_result)  # STARTED is stored with a claim
    )


def _envelope(request: Any) -> Envelope:
    """Return the message of a request as it is recorded, so that it can be put back."""
    recorded = Stamp(request.stamp.call, request.stamp.seq, True).header(request.id)
    return Envelope.delivered(
        ensure_bytes(request.body),
        (request.content_type, request.content_encoding),
        {**request.message.headers, STAMP: recorded},
        request.delivery_info,
        correlation_id=request.correlation_id,
        reply_to=request.reply_to,
        priority=request.delivery_info.get("priority"),
    )
