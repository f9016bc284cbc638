"""The clerk: threads of a worker's parent that claim, and commit outcomes, in batches.

They keep no state of the worker's: what they are told to claim they claim or not, what they are
left they commit.  What they cannot do in a batch goes through the statements for one task.

Two threads take turns with outcomes: one takes and commits them; where messages follow from them,
or a chord is complete, it leaves the next ones to the other and sends what follows itself.  So that
begins at once, and no outcome waits for a broker that takes nothing: what the other one commits
meanwhile is sent by the first.  About once a second what was sent is marked; most of it has been
claimed by then.
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
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from celery_pgbarrier import barrier, outbox
from celery_pgbarrier.batch import commit, logged
from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.lease import boot, publish_recorded
from celery_pgbarrier.reaper import Failing
from celery_pgbarrier.store import sql
from celery_pgbarrier.store.tasks import array
from celery_pgbarrier.unit import Fence, Stamp, Unit
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
#: How much may wait for the broker, in commits; the reaper does what comes on top.
_BEHIND = 1000

_Work = Callable[[Failing], None]


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
        self._notices = self._writer.dup()  # for what must not wait for room
        self._notices.setblocking(False)
        self._orders: SimpleQueue[_Work | None] = SimpleQueue()
        self._sendings: deque[_Work] = deque()
        self._committing, self._sending = threading.Lock(), threading.Lock()
        self._ended = False  # nothing is taken any more, and all that was taken is settled
        self._marks: dict[bytes, threading.Event] = {}
        self._threads: list[threading.Thread] = []
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

    def start(self, make_host: Callable[[], Failing]) -> None:
        """Start the threads, each with a backend of its own."""
        for name, target in (
            ("claims", self._keep_claiming),
            ("outcomes-1", self._keep_committing),
            ("outcomes-2", self._keep_committing),
        ):
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

    def leave(self, unit: Unit) -> bool:
        """In a pool process: leave an outcome, with the messages that follow, to be committed.

        Returns False where that cannot be.
        """
        data = pickle.dumps(unit, pickle.HIGHEST_PROTOCOL)
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
        data = _SENT + json.dumps(ids).encode()
        try:
            return len(data) <= LARGEST and bool(self._notices.send(data))
        except OSError:  # no room, or nobody reads it
            return False

    def flush(self, patience: float) -> bool:
        """Wait until the outcomes that were left so far are settled; False: out of patience."""
        mark, done = _MARK + uuid.uuid4().bytes, threading.Event()
        self._marks[mark] = done
        try:
            self._notices.send(mark)
            return done.wait(patience)
        except OSError:  # no room: the thread is behind, or it has ended
            return self._ended
        finally:
            del self._marks[mark]

    # -- the threads

    def _keep_claiming(self, host: Failing) -> None:
        try:
            while (order := self._orders.get()) is not None:
                try:
                    order(host)
                except Exception as error:  # the processes claim for themselves then
                    logger.warning("Tasks are not claimed ahead: %s", error)
        finally:
            self.claiming = False
            host.database.dispose()

    def _claim(self, grants: list[Grant], granted: deque[Any], host: Failing) -> None:
        try:
            _claim(grants, granted, host)
        finally:
            self.busy = False

    def _release(
        self, grants: list[Grant], gone: list[str], done: threading.Event, host: Failing
    ) -> None:
        try:
            _release(grants, gone, host)
        finally:
            done.set()
        if gone:  # not in this thread: claims must not wait for a broker that is away
            self._sendings.append(partial(publish_recorded, ids=gone))
            self.sent([])  # wakes a thread

    def _keep_committing(self, host: Failing) -> None:
        wait = min(_UNMARKED, _PART * host.settings.publish_grace)
        try:
            while not self._ended:
                with self._committing:
                    while not (self._ended or self._to_send()):
                        self._take_turn(host, wait)
                self._send(host)
        finally:
            with self._committing:
                self._end()
            host.database.dispose()

    def _end(self) -> None:
        self._ended = True
        self._reader.close()  # the processes notice it and commit for themselves

    def _take_turn(self, host: Failing, wait: float) -> None:
        """Commit what has been left, mark what was sent."""
        units: list[Unit] = []
        marks, ends = [], False
        for data in self._received():
            if data.startswith(_MARK):
                marks.append(data)
            elif data.startswith(_SENT):
                self._unmarked += json.loads(data[len(_SENT) :])
                self._due = self._due or time.monotonic() + wait
            elif data in (_END, b""):
                ends = True
            else:
                with logged("An outcome cannot be read, its task runs again"):
                    units.append(pickle.loads(data))
        commit(host, units, self._follow)
        for mark in marks:
            if (done := self._marks.get(mark)) is not None:
                done.set()
        if self._unmarked and (ends or time.monotonic() >= self._due):
            ids, self._unmarked, self._due = self._unmarked, [], 0.0
            outbox.mark_unclaimed(host, ids)
        if ends:
            self._end()

    def _follow(self, followed: Unit, committed: Committed) -> None:
        """Have done what follows from committed outcomes; the reaper does it where that waits."""
        if not (followed.events or committed.ready):
            return
        if len(self._sendings) < _BEHIND:
            self._sendings.append(partial(barrier.follow, unit=followed, committed=committed))
        else:
            logger.warning("The broker is slow: what follows from outcomes is left to the reaper")

    def _to_send(self) -> bool:
        return bool(self._sendings) and not self._sending.locked()

    def _send(self, host: Failing) -> None:
        """Do what waits for the broker, unless the other thread is about it."""
        while self._sendings and self._sending.acquire(blocking=False):
            try:
                while self._sendings:
                    with logged("Messages are sent, and chords released, later"):
                        self._sendings.popleft()(host)
            finally:
                self._sending.release()

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


def _claim(grants: list[Grant], granted: deque[Any], host: Failing) -> None:
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


def _release(grants: list[Grant], gone: list[str], host: Failing) -> None:
    parameters = {
        "ids": array(grant.task_id for grant in grants),
        "tokens": array(grant.token for grant in grants),
        "gone": array(gone),
        "after": host.settings.republish_after,
        "grace": host.settings.publish_grace,
    }
    host.database.count(sql.RELEASE_AHEAD, parameters, host.settings.heartbeat)
