"""The clerk: two threads of a worker's parent that claim, and commit outcomes, in batches.

They keep no state of the worker's: what they are told to claim they claim or not, what they are
left they commit.  What they cannot do in a batch goes through the statements for one task.  They
also mark, about once a second, what tasks' outcomes published; most of it has been claimed by then.
"""

from __future__ import annotations

import json
import logging
import mmap
import pickle
import random
import select
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from celery_pgbarrier import barrier, outbox
from celery_pgbarrier.barrier import Releasing
from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.errors import DatabaseUnavailable
from celery_pgbarrier.lease import boot, publish_recorded
from celery_pgbarrier.store import sql
from celery_pgbarrier.store.tasks import array
from celery_pgbarrier.unit import Fence, Outcome, Stamp, Unit
from celery_pgbarrier.writing import Committed

logger = logging.getLogger(__name__)

#: How long more outcomes are waited for while messages wait in the worker (seconds).
_LINGER = 0.01
#: Outcomes per statement, and bytes of one that a pool process leaves to the clerk.
_MOST, LARGEST = 256, 32768
#: How long a pool process waits for room in the socket (seconds).
_ROOM = 5.0
#: How long published messages wait for their mark: in seconds, and as a part of the time after
#: which the reaper would publish them again.
_UNMARKED, _PART = 1.0, 0.25
#: What is sent among the outcomes: tell when all before this is settled (with a number); messages
#: are published (with their ids); end.  Pickled outcomes begin with none of these.
_MARK, _SENT, _END = b"?", b"!", b"."


def now() -> float:
    """Return the age of the machine in seconds, its sleep included where the system tells."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


@dataclass
class Grant:
    """A claim that is made ahead; ``granted_at`` (monotonic time) is 0 while it is not granted.

    ``request``: where its message is to be acknowledged once it is granted, the request.
    """

    task_id: str
    stamp: Stamp
    name: str
    envelope: Callable[[], Envelope]
    token: str
    request: Any = None
    granted_at: float = 0.0
    barrier_id: str | None = None

    def field(self) -> list[Any]:
        """Return the grant as the request field that the pool process reads."""
        return [self.token, self.granted_at, self.barrier_id, boot.current(), self.stamp.seq]

    def fence(self) -> Fence:
        """Return the word on which the parent writes an outcome of the task."""
        return Fence(
            token=self.token,
            worker=boot.current(),
            stamp=self.stamp,
            attempt=1,
            barrier=self.barrier_id,
        )


class Clerk:
    """The threads, and how they are told what to do."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._writer.settimeout(_ROOM)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)
        self._orders: SimpleQueue[Callable[[Releasing], None] | None] = SimpleQueue()
        self._marks: dict[bytes, threading.Event] = {}
        self._threads: list[threading.Thread] = []
        self._publishing: list[threading.Thread] = []
        self._unmarked: list[str] = []  # of the thread that commits
        self._due = 0.0  # when they are to be marked (monotonic time)
        self._bits = random.Random().getrandbits  # of this worker: seeded by the system
        #: Requests that are granted and whose messages are to be acknowledged.
        self.granted: deque[Any] = deque()
        #: Whether orders are taken, and whether one is being carried out: what comes in the
        #: meantime is for the next.
        self.claiming, self.busy = True, False
        #: Set while no messages wait in the worker: there is no use in waiting for more outcomes.
        self.quiet = threading.Event()
        #: Not zero while messages wait in the worker, as its pool processes see it.
        self.waiting = mmap.mmap(-1, 1)

    def start(self, make_host: Callable[[], Releasing]) -> None:
        """Start the threads, each with a backend of its own."""
        for name, target in (("claims", self._keep_claiming), ("outcomes", self._keep_committing)):
            thread = threading.Thread(
                target=target, args=(make_host(),), name=f"pgbarrier-{name}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def stop(self, patience: float) -> None:
        """Settle what is in hand, for at most *patience* seconds, and end the threads."""
        self._orders.put(None)
        with suppress(OSError):
            self._writer.send(_END)
        deadline = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        for thread in self._publishing:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def inherit(self) -> None:
        """In a pool process: let go of the parent's end, so that its death is noticed."""
        self._reader.close()

    # -- orders

    def token(self) -> str:
        """Return the token of a new grant.

        Not from the system each time: a system call is where the event loop's thread, which asks,
        would have to stop for the others.
        """
        return str(uuid.UUID(int=self._bits(128), version=4))

    def claim(self, grants: list[Grant]) -> None:
        """Have tasks claimed: those that are say so some time later."""
        self.busy = True
        self._orders.put(partial(self._claim, grants, self.granted))

    def release(self, grants: list[Grant], gone: list[str], patience: float) -> None:
        """Have claims released, and wait for it for at most *patience* seconds.

        Parameters:
            gone: ids of tasks whose messages the broker has no more; they are published after it.
        """
        done = threading.Event()
        self._orders.put(partial(self._release, grants, gone, done))
        done.wait(patience)

    def leave(self, outcome: Outcome) -> bool:
        """In a pool process: leave an outcome to be committed; False where that cannot be."""
        data = pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL)
        if len(data) > LARGEST:
            return False
        try:
            self._writer.send(data)
        except OSError as error:
            logger.warning("The worker's parent takes no outcome: %s", error)
            return False
        return True

    def sent(self, ids: list[str]) -> bool:
        """In any process: leave it to be said that messages are published; False: not taken."""
        if threading.current_thread() in self._threads:
            self._unmarked += ids
            return True
        data = _SENT + json.dumps(ids).encode()
        try:
            return len(data) <= LARGEST and bool(self._writer.send(data))
        except OSError:
            return False

    def flush(self, patience: float) -> bool:
        """Wait until the outcomes that were left so far are settled; False: out of patience."""
        mark, done = _MARK + uuid.uuid4().bytes, threading.Event()
        self._marks[mark] = done
        try:
            self._writer.send(mark, socket.MSG_DONTWAIT)
            return done.wait(patience)
        except OSError:  # no room: the thread is behind, or it has ended
            return not any(thread.is_alive() for thread in self._threads)
        finally:
            del self._marks[mark]

    # -- the threads

    def _keep_claiming(self, host: Releasing) -> None:
        try:
            while (order := self._orders.get()) is not None:
                try:
                    order(host)
                except Exception as error:  # the processes claim for themselves then
                    logger.warning("Tasks are not claimed ahead: %s", error)
        finally:
            self.claiming = False
            host.database.dispose()

    def _claim(self, grants: list[Grant], granted: deque[Any], host: Releasing) -> None:
        try:
            _claim(grants, granted, host)
        finally:
            self.busy = False

    def _release(
        self, grants: list[Grant], gone: list[str], done: threading.Event, host: Releasing
    ) -> None:
        try:
            _release(grants, gone, host)
        finally:
            done.set()
        if gone:  # not in this thread: claims must not wait for a broker that is away
            thread = threading.Thread(target=_publish, args=(host, gone), daemon=True)
            thread.start()
            self._publishing = [each for each in self._publishing if each.is_alive()] + [thread]

    def _keep_committing(self, host: Releasing) -> None:
        try:
            self._commit_until_told(host)
        finally:
            self._reader.close()  # the processes notice it and commit for themselves
            host.database.dispose()

    def _commit_until_told(self, host: Releasing) -> None:
        more = True
        wait = min(_UNMARKED, _PART * host.settings.publish_grace)
        while more:
            outcomes: list[Outcome] = []
            marks = []
            for data in self._received():
                if data.startswith(_MARK):
                    marks.append(data)
                elif data.startswith(_SENT):
                    self._unmarked += json.loads(data[len(_SENT) :])
                elif data in (_END, b""):
                    more = False
                else:
                    with _logged("An outcome cannot be read, its task runs again"):
                        outcomes.append(pickle.loads(data))
            with _logged("Outcomes are lost, their tasks run again"):
                _commit(host, outcomes)
            for mark in marks:
                if (done := self._marks.get(mark)) is not None:
                    done.set()
            self._mark(host, wait if more else 0.0)

    def _mark(self, host: Releasing, wait: float) -> None:
        """Mark published messages, *wait* seconds after the first of them came."""
        if self._unmarked and not self._due:
            self._due = time.monotonic() + wait
        if self._unmarked and (not wait or time.monotonic() >= self._due):
            ids, self._unmarked, self._due = self._unmarked, [], 0.0
            outbox.mark_published(host, ids)

    def _received(self) -> Iterator[bytes]:
        """Yield what has been left, and what comes within a moment; nothing when marks are due."""
        if self._due and not self._poll.poll(max(self._due - time.monotonic(), 0.0) * 1000):
            return
        yield self._reader.recv(2 * LARGEST)
        self.quiet.wait(_LINGER)
        for _ in range(_MOST):
            try:
                data = self._reader.recv(2 * LARGEST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            yield data


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Log an error of one and go on with the others."""
    try:
        yield
    except Exception:
        logger.exception("%s", what)


def _claim(grants: list[Grant], granted: deque[Any], host: Releasing) -> None:
    """Claim tasks, in one statement those with a row and in another those without."""
    by_token = {grant.token: grant for grant in grants}
    grants = sorted(grants, key=lambda grant: grant.task_id)  # one order of locks for all
    at = now()
    for recorded, statement in ((True, sql.CLAIM_QUEUEDS), (False, sql.CLAIM_FIRSTS)):
        chosen = [grant for grant in grants if grant.stamp.recorded is recorded]
        if not chosen:
            continue
        parameters: dict[str, Any] = {
            "worker": boot.current(),
            "ids": array(grant.task_id for grant in chosen),
            "calls": array(grant.stamp.call for grant in chosen),
            "seqs": array(grant.stamp.seq for grant in chosen),
            "copies": array(grant.stamp.copy for grant in chosen),
            "tokens": array(grant.token for grant in chosen),
        }
        if not recorded:
            envelopes = [grant.envelope() for grant in chosen]
            parameters["names"] = array(grant.name for grant in chosen)
            parameters["queues"] = array(envelope.queue for envelope in envelopes)
            parameters["messages"] = array(envelope.encode() for envelope in envelopes)
        for row in host.database.statement(statement, parameters):
            grant = by_token[row.token]
            grant.barrier_id = row.barrier_id
            grant.granted_at = at
            if grant.request is not None:
                granted.append(grant.request)


def _release(grants: list[Grant], gone: list[str], host: Releasing) -> None:
    parameters = {
        "ids": array(grant.task_id for grant in grants),
        "tokens": array(grant.token for grant in grants),
        "gone": array(gone),
        "after": host.settings.republish_after,
        "grace": host.settings.publish_grace,
    }
    host.database.count(sql.RELEASE_AHEAD, parameters, host.settings.heartbeat)


def _publish(host: Releasing, ids: list[str]) -> None:
    with _logged("Released tasks are published later, by the reaper"):
        publish_recorded(host, ids)


def _commit(host: Releasing, outcomes: list[Outcome]) -> None:
    """Commit outcomes: those of members in one statement, those of other tasks in another."""
    for statement, chosen in (
        (sql.FINISH_ALONES, [o for o in outcomes if o.fence.barrier is None]),
        (sql.FINISH_MEMBERS, [o for o in outcomes if o.fence.barrier is not None]),
    ):
        left = {outcome.task_id: outcome for outcome in chosen}
        if len(left) > 1:
            ready = _commit_many(host, statement, left)
            with _logged("Chords that are complete are released later"):
                barrier.follow(host, Unit(), Committed(ready))
        for outcome in left.values():
            with _logged(f"The outcome of task {outcome.task_id} is lost, it runs again"):
                _commit_one(host, outcome)


def _commit_many(host: Releasing, statement: str, left: dict[str, Outcome]) -> list[str]:
    """Commit outcomes, take the accepted ones out of *left*, return barriers they completed."""
    outcomes = list(left.values())
    parameters = {
        "ids": array(outcome.task_id for outcome in outcomes),
        "tokens": array(outcome.fence.token for outcome in outcomes),
        "statuses": array(outcome.stored_status for outcome in outcomes),
        "results": array(outcome.result for outcome in outcomes),
        "write_tokens": array(outcome.write_token for outcome in outcomes),
        "expires": host.keep,
        "barriers": array({o.fence.barrier for o in outcomes if o.fence.barrier}),
    }
    rows = host.database.statement(statement, parameters, host.settings.outcome_timeout)
    for row in rows:
        left.pop(row.id, None)
    return [row.ready for row in rows if row.ready]


def _commit_one(host: Releasing, outcome: Outcome) -> None:
    unit = Unit()
    unit.primary = outcome
    try:
        committed = barrier.commit(host, unit, host.settings.outcome_timeout)
    except DatabaseUnavailable as error:
        logger.error("The outcome of task %s is given up: %s", outcome.task_id, error)
        return
    if committed is None:
        logger.warning(
            "An outcome of task %s was refused: another run of it stands", outcome.task_id
        )
    else:
        barrier.follow(host, unit, committed)
