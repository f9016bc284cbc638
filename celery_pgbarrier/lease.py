"""Claims: who runs a task, and what becomes of it when that one is gone."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from celery_pgbarrier import faults
from celery_pgbarrier.dispatch import publish
from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.outbox import mark_published
from celery_pgbarrier.store import sql
from celery_pgbarrier.store.tasks import array
from celery_pgbarrier.unit import STAMP, Fence, Host, Message, Stamp, Unit

logger = logging.getLogger(__name__)

#: How a pool child that was spawned, not forked, learns its worker's boot id.
_VARIABLE = "PGBARRIER_WORKER"


# -- who this process is


@dataclass(frozen=True)
class Holder:
    """Who holds a claim: a boot of a worker, a process of it, a thread of that."""

    worker: str
    pid: int
    thread: int


class Boot:
    """The boot of a worker that this process belongs to: an id that no restart shares."""

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.state = "running"
        self.cancelled: set[str] = set()
        self._pid = 0

    def begin(self, name: str) -> None:
        """Make this process the parent of a new boot; pool children inherit it."""
        self.id, self.name, self._pid = str(uuid.uuid4()), name, os.getpid()
        self.state = "running"
        os.environ[_VARIABLE] = f"{self.id}:{self._pid}:{name}"

    def current(self) -> str:
        """Return the boot id; a process outside a worker becomes a boot of its own."""
        if not self.id:
            boot, _, rest = os.environ.get(_VARIABLE, "").partition(":")
            parent, _, name = rest.partition(":")
            if parent and int(parent) in (os.getppid(), os.getpid()):
                self.id, self.name, self._pid = boot, name, int(parent)
            else:
                self.begin(f"pid {os.getpid()}")
        return self.id


boot = Boot()


def holder() -> Holder:
    """Return who a claim made here and now belongs to."""
    return Holder(boot.current(), os.getpid(), threading.get_ident())


# -- claiming


class Verdict(Enum):
    """What became of a claim."""

    GRANTED = "granted"
    FINISHED = "the task has finished"
    SUPERSEDED = "an old copy: the task was retried, replaced or called again"
    HELD = "another process is running the task"
    PURGED = "the task has finished and its row was purged"


@dataclass
class Attempt:
    """A granted run of a task, from its claim to its outcome.

    ``phase`` is "body" while the task's code runs, "ended" between its return and its outcome
    (what is published then belongs to the outcome), "closed" after.  ``ahead`` tells that the
    worker's parent claimed it and takes its outcome (see :mod:`celery_pgbarrier.ahead`);
    ``claimed_at`` is when its own process did, 0 where it is to store its outcome in any case.
    """

    task_id: str
    stamp: Stamp
    token: str
    number: int
    barrier_id: str | None
    unit: Unit
    phase: str = "body"
    entered: bool = False
    replaced: bool = False
    ahead: bool = False
    claimed_at: float = 0.0
    added: set[str] = field(default_factory=set)
    steps: set[str] = field(default_factory=set)

    def own_message(self) -> Message | None:
        """Return the caught message that carries the task on: a retry or a replacement."""
        return self.unit.message_of(self.task_id)

    def fence(self) -> Fence:
        """Return the word on which this attempt's outcome stands."""
        return Fence(
            token=self.token, stamp=self.stamp, attempt=self.number, barrier=self.barrier_id
        )

    def next_stamp(self) -> Stamp:
        """Return the stamp of the task's next message."""
        return Stamp(self.stamp.call, self.stamp.seq + 1, True)


@dataclass(frozen=True)
class Claim:
    """What a claim writes: the message's stamp, and the message for a task without a row.

    ``token`` is that of a claim which the worker's parent has made or tried.  ``again`` tells that
    a claim of this thread may be made anew: that run has ended without an outcome.
    """

    task_id: str
    stamp: Stamp
    name: str
    status: str | None = None
    result: bytes | None = None
    envelope: Callable[[], Envelope] | None = None
    token: str | None = None
    again: bool = True


def claim(host: Host, request: Claim) -> tuple[Verdict, Attempt | None]:
    """Claim a task for this thread; retries while PostgreSQL is away.

    Raises:
        DatabaseUnavailable: PostgreSQL was away for ``pgbarrier_outcome_timeout``.
    """
    token = request.token or str(uuid.uuid4())
    me = holder()
    stamp = request.stamp
    parameters: dict[str, object] = {
        "id": request.task_id,
        "call": stamp.call,
        "seq": stamp.seq,
        "copy": stamp.copy,
        "recorded": stamp.recorded,
        "token": token,
        "worker": me.worker,
        "pid": me.pid,
        "thread": me.thread if request.again else None,
        "status": request.status,
        "result": request.result,
    }
    usual, statement = sql.CLAIM_QUEUED, sql.CLAIM_RECORDED
    if not stamp.recorded and request.envelope is not None:
        envelope = request.envelope()
        recorded = Stamp(stamp.call, stamp.seq, True)
        envelope.headers[STAMP] = recorded.header(request.task_id)
        usual, statement = sql.CLAIM_FIRST, sql.CLAIM_NEW
        parameters.update(name=request.name, queue=envelope.queue, message=envelope.encode())
    if request.token is not None:
        usual = statement  # the row, if there is one, is most likely claimed under this token
    patience = host.settings.outcome_timeout
    while True:
        rows = host.database.statement(usual, parameters, patience)
        if not rows and usual != statement:
            rows = host.database.statement(statement, parameters, patience)
        if rows:
            attempt = Attempt(
                request.task_id, stamp, token, rows[0].attempt, rows[0].barrier_id, Unit(stamp.call)
            )
            faults.point("claim.granted")
            return Verdict.GRANTED, attempt
        seen = host.database.statement(
            sql.INSPECT, {"id": request.task_id, "worker": me.worker}, patience
        )[0]
        if not seen.registered:
            beat(host, patience=patience)
        elif not _claimable(seen, stamp):
            return _why(seen.state, seen.call, seen.seq, stamp), None


def _claimable(seen: Any, stamp: Stamp) -> bool:
    """Tell whether nothing speaks against a claim: its worker was registered a moment too late."""
    if seen.state is None:
        return not stamp.recorded
    return bool(seen.state == "queued" and (seen.call, seen.seq) == (stamp.call, stamp.seq))


def _why(state: str | None, call: str | None, seq: int | None, stamp: Stamp) -> Verdict:
    if state is None:
        return Verdict.PURGED
    if (call, seq) != (stamp.call, stamp.seq) and stamp.recorded:
        return Verdict.SUPERSEDED
    if state == "done":
        return Verdict.FINISHED
    return Verdict.HELD if state == "running" else Verdict.SUPERSEDED


# -- the lease


def beat(host: Host, state: str = "running", patience: float = 0.0) -> None:
    """Renew this worker's lease (registers it where it is unknown)."""
    parameters = {"id": boot.current(), "name": boot.name, "state": state}
    host.database.count(sql.WORKER_BEAT, parameters, patience)


def stopped(host: Host) -> None:
    """Tell that this worker has ended: what it still claims is put back at once."""
    host.database.count(sql.WORKER_STOPPED, {"id": boot.current()}, 1.0)


# -- putting back


class Loss(Enum):
    """What became of a task whose process is gone."""

    RELEASED = "put back"
    FINISHED = "its outcome was stored before"
    SPENT = "its crashes are spent"
    ELSEWHERE = "another process has it"
    UNKNOWN = "there is no row"


@dataclass(frozen=True)
class Held:
    """A task row as seen by whoever finds its process gone."""

    task_id: str
    state: str
    token: str | None
    worker: str | None = None
    pid: int | None = None
    call: str | None = None
    seq: int = 0
    barrier_id: str | None = None
    message: bytes | None = None

    def is_of(self, stamp: Stamp, worker: str, pid: int | None, token: str | None) -> bool:
        """Tell whether the row is that of a message in hand: held by its process, or unclaimed."""
        if self.state == "running":
            return self.worker == worker and (self.pid == pid or self.token == (token or ""))
        return (self.call, self.seq) == (stamp.call, stamp.seq)


def put_back(
    host: Host, held: Held, crash: bool, patience: float, publish_now: bool = True
) -> Loss:
    """Release a claim (or count a crash before any claim) and publish the task again.

    Parameters:
        crash: whether the process died; counted against ``pgbarrier_max_crashes``.
        patience: seconds for which a database that is away is retried.
        publish_now: whether to publish at once, not after ``pgbarrier_publish_grace``.
    """
    rows = host.database.statement(
        sql.RELEASE,
        {
            "id": held.task_id,
            "state": held.state,
            "token": held.token,
            "worker": held.worker,
            "crash": int(crash),
            "grace": host.settings.publish_grace,
            "max_crashes": host.settings.max_crashes,
        },
        patience,
    )
    if rows:
        faults.point("reap.released")
        if publish_now:
            publish_recorded(host, [held.task_id])
        return Loss.RELEASED
    seen = inspect(host, held.task_id, patience)
    if seen is None:
        return Loss.UNKNOWN
    passed_on = held.token is None and seen.worker != held.worker
    if passed_on or (seen.state, seen.token) != (held.state, held.token):
        return Loss.FINISHED if seen.state == "done" else Loss.ELSEWHERE
    return Loss.SPENT


def inspect(host: Host, task_id: str, patience: float) -> Held | None:
    """Return a task's row as it stands, None where there is none."""
    seen = host.database.statement(
        sql.INSPECT, {"id": task_id, "worker": boot.current()}, patience
    )[0]
    if seen.state is None:
        return None
    held = seen._asdict()
    fields = ("state", "token", "worker", "pid", "call", "seq", "barrier_id", "message")
    return Held(task_id, **{field: held[field] for field in fields})


def publish_recorded(host: Host, ids: Sequence[str]) -> None:
    """Publish queued tasks' recorded messages now."""
    if not ids:
        return
    rows = host.database.statement(sql.MESSAGES, {"ids": array(ids)}, 1.0)
    envelopes = ((row.id, Envelope.decode(row.message).copied(row.copies)) for row in rows)
    mark_published(host, publish(host.app, envelopes))


def abandon(host: Host, attempt: Attempt) -> None:
    """End a claim whose task left no outcome and is not to run again (a bare ``Ignore``)."""
    host.database.count(
        sql.ABANDON,
        {"id": attempt.task_id, "token": attempt.token, "expires": host.keep},
        host.settings.outcome_timeout,
    )
