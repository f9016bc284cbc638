"""What one transaction is going to write: outcomes, barriers, messages."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from celery import Celery

from celery_pgbarrier.envelope import STAMP as STAMP
from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.settings import Settings
from celery_pgbarrier.store.database import Database


class Host(Protocol):
    """What the services need of the result backend."""

    app: Celery

    @property
    def database(self) -> Database: ...

    @property
    def settings(self) -> Settings: ...

    @property
    def keep(self) -> float | None:
        """Seconds for which finished rows are kept, None for ever."""
        ...


@dataclass(frozen=True)
class Stamp:
    """Which call, and which retry or replacement of it, a message belongs to.

    ``recorded`` tells that the message has a row: without one, the row was finished and purged.
    ``copy`` counts the publications of the same message.
    """

    call: str
    seq: int = 0
    recorded: bool = False
    copy: int = 0

    def header(self, task_id: str) -> str:
        """Return the stamp as it stands in the header of the task's message."""
        return f"{self.call} {self.seq} {int(self.recorded)} {self.copy} {task_id}"

    @classmethod
    def of(cls, task_id: str, header: Any) -> Stamp:
        """Read a message's stamp.

        A message without one, or with one that was passed on from another task, gets strict
        deduplication by its task id.
        """
        owner, stamp = cls.read(header)
        if stamp is None or owner != task_id:
            return cls(str(uuid.uuid5(uuid.NAMESPACE_OID, task_id)))
        return stamp

    @classmethod
    def read(cls, header: Any) -> tuple[str | None, Stamp | None]:
        """Return the task that a stamp is of, and the stamp; None where it is none."""
        if isinstance(header, str):
            try:
                call, seq, recorded, copy, task_id = header.split(" ", 4)
                return task_id, cls(call, int(seq), recorded == "1", int(copy))
            except ValueError:
                return None, None
        if not isinstance(header, Mapping) or "call" not in header:
            return None, None
        # As earlier releases wrote it: their messages may still wait.
        numbers = int(header.get("seq", 0)), int(header.get("copy", 0))
        return header.get("id"), cls(
            str(header["call"]), numbers[0], bool(header.get("rec")), numbers[1]
        )


#: The request field by which a pool process is told of its task's claim.
GRANT = "pgb_grant"
#: The ``pid`` of a :class:`Fence` where no process runs the task.
NO_PROCESS = -1


@dataclass(frozen=True)
class Fence:
    """On whose word an outcome is written.

    An attempt gives its claim ``token`` and the ``barrier`` that it counts for, and its number and
    stamp, by which a claim is recognised that a crash of the server took back (first claims are not
    flushed).  A worker's parent gives
    ``worker``, ``pid`` (of the child) and the ``stamp`` of the message in its hand.  Neither: a
    plain task; ``has_row`` tells that it was recorded before it ran.
    """

    token: str | None = None
    worker: str | None = None
    pid: int | None = None
    stamp: Stamp | None = None
    attempt: int = 0
    barrier: str | None = None
    has_row: bool = False


@dataclass
class Outcome:
    """The end of a task: its Celery state and its encoded metadata.

    ``visible`` is False for ignored results: a chord gets them, nobody else does.
    """

    task_id: str
    status: str
    result: bytes | None
    visible: bool = True
    fence: Fence = field(default_factory=Fence)
    write_token: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def stored_status(self) -> str:
        """The state that callers see."""
        return self.status if self.visible else "PENDING"

    def __reduce__(self) -> Any:
        """Pickle the values only: a tenth of the time, for each task of a busy worker."""
        fence, stamp = self.fence, self.fence.stamp
        return _outcome, (
            *(self.task_id, self.status, self.result, self.visible, self.write_token),
            *(fence.token, fence.worker, fence.pid, fence.attempt, fence.barrier, fence.has_row),
            *(() if stamp is None else (stamp.call, stamp.seq, stamp.recorded, stamp.copy)),
        )


def _outcome(
    task_id: str,
    status: str,
    result: bytes | None,
    visible: bool,
    write_token: str,
    token: str | None,
    worker: str | None,
    pid: int | None,
    attempt: int,
    barrier: str | None,
    has_row: bool,
    *stamp: Any,
) -> Outcome:
    held = Stamp(*stamp) if stamp else None
    fence = Fence(token, worker, pid, held, attempt, barrier, has_row)
    return Outcome(task_id, status, result, visible, fence, write_token)


@dataclass
class HandOver:
    """A claim's end by retry or replace: the row waits for its next message."""

    task_id: str
    fence: Fence
    stamp: Stamp
    status: str | None = None
    result: bytes | None = None

    @property
    def write_token(self) -> str:
        """The token by which a write whose answer was lost is recognised."""
        assert self.fence.token is not None
        return self.fence.token


class Message:
    """A captured task message, kept encoded, and what its fields say of barriers.

    ``presumed``: it is recorded as published, because its barrier tells whether all of them are.
    """

    __slots__ = (
        "chain",
        "encoded",
        "eta",
        "group",
        "in_chord",
        "name",
        "presumed",
        "queue",
        "reads",
        "task_id",
    )

    def __init__(
        self,
        task_id: str,
        name: str,
        envelope: Envelope,
        eta: str | None = None,
        group: str | None = None,
        in_chord: bool = False,
        chain: Sequence[Any] = (),
        reads: str | None = None,
    ) -> None:
        self.task_id = task_id
        self.name = name
        self.queue = envelope.queue
        self.encoded = envelope.encode()
        self.eta = eta
        self.group = group
        self.in_chord = in_chord
        self.chain = chain
        self.reads = reads
        self.presumed = False

    def __reduce__(self) -> Any:
        """Pickle what recording and publishing it takes: no barrier is opened elsewhere."""
        fields = (self.task_id, self.name, self.queue, self.encoded, self.eta, self.reads)
        return _message, fields

    @property
    def envelope(self) -> Envelope:
        """The message, decoded."""
        return Envelope.decode(self.encoded)

    def stamp(self, stamp: Stamp) -> None:
        """Give the message another stamp than that under which it was captured."""
        self.encoded = self.envelope.stamped(stamp.header(self.task_id)).encode()


def _message(
    task_id: str, name: str, queue: str, encoded: bytes, eta: str | None, reads: str | None
) -> Message:
    message = Message.__new__(Message)
    message.task_id, message.name, message.queue = task_id, name, queue
    message.encoded, message.eta, message.reads = encoded, eta, reads
    message.group, message.in_chord, message.chain = None, False, ()
    message.presumed = False
    return message


@dataclass
class Barrier:
    """A chord to open: its body, and its members' ids in header order.

    ``members`` is None for a header that is a generator: they are read off the messages.
    """

    id: str
    body: bytes
    body_signature: Any
    members: list[str] | None = None
    structure: bytes | None = None


@dataclass(frozen=True)
class Poison:
    """A task that is failed for good: its message is kept."""

    task_id: str
    name: str | None
    reason: str


@dataclass
class Addition:
    """A member that a running member adds to its chord."""

    barrier: str
    task_id: str
    adder: str


class Unit:
    """One transaction in the making.

    Parameters:
        parent_call: the call of the attempt that makes it; its messages then get calls that are
            derived from it, so that making the same unit again is recognised.
    """

    def __init__(self, parent_call: str | None = None) -> None:
        self.parent_call = parent_call
        self.primary: Outcome | HandOver | None = None
        self.outcomes: dict[str, Outcome] = {}
        self.events: list[Message | Barrier] = []
        self.additions: list[Addition] = []
        self.sent_events: list[Callable[[Any], Any]] = []
        self.inline: list[Callable[[], None]] = []
        self.poison: Poison | None = None

    @cached_property
    def call(self) -> str:
        """The call of what has no parent call."""
        return str(uuid.uuid4())

    def message_of(self, task_id: str) -> Message | None:
        """Return the captured message of a task."""
        return next((m for m in self.messages if m.task_id == task_id), None)

    @property
    def messages(self) -> list[Message]:
        """The captured messages in the order in which they were sent."""
        return [event for event in self.events if isinstance(event, Message)]

    @property
    def barriers(self) -> list[Barrier]:
        """The barriers in the order in which they were opened."""
        return [event for event in self.events if isinstance(event, Barrier)]

    @property
    def plain(self) -> bool:
        """Whether there is nothing beyond the primary outcome."""
        return not (self.events or self.outcomes or self.additions or self.poison)

    @property
    def plain_messages(self) -> bool:
        """Whether there is nothing beyond the primary outcome and messages that follow from it."""
        beyond = self.outcomes or self.additions or self.poison or self.inline or self.sent_events
        return not (beyond or self.barriers)

    def __reduce__(self) -> Any:
        """Pickle a unit of :attr:`plain_messages`."""
        return _unit, (self.parent_call, self.primary, *self.messages)

    def call_of(self, task_id: str) -> str:
        """Return the call of a message or barrier of this unit."""
        if self.parent_call is None:
            return self.call
        return str(uuid.uuid5(uuid.UUID(self.parent_call), task_id))

    def members_of(self, barrier: Barrier) -> list[str]:
        """Return the ids of a barrier's members in header order."""
        if barrier.members is not None:
            return barrier.members
        ids: dict[str, None] = {}
        for event in self.events:
            if isinstance(event, Barrier):
                if event is not barrier:
                    ids.update(dict.fromkeys(leaves(event.body_signature, barrier.id)))
            elif event.in_chord and event.group == barrier.id:
                ids[event.task_id] = None
            elif event.chain:
                ids.update(dict.fromkeys(leaves(event.chain[0], barrier.id)))
        return list(ids)


def _unit(parent_call: str | None, primary: Outcome, *messages: Message) -> Unit:
    unit = Unit(parent_call)
    unit.primary = primary
    unit.events.extend(messages)
    return unit


def leaves(signature: Any, barrier_id: str | None = None) -> Iterator[str]:
    """Yield the tasks of a frozen signature whose end counts for a barrier (None: for any)."""
    if not isinstance(signature, Mapping):
        return
    kind, kwargs = signature.get("subtask_type"), signature.get("kwargs") or {}
    options = signature.get("options") or {}
    if kind == "group":
        for task in kwargs.get("tasks", ()):
            yield from leaves(task, barrier_id)
    elif kind == "chain":
        yield from leaves((list(kwargs.get("tasks", ())) or [None])[-1], barrier_id)
    elif kind == "chord":
        yield from leaves(kwargs.get("body"), barrier_id)
    elif "chord" in options and barrier_id in (None, options.get("group_id")):
        yield options["task_id"]


def all_ids(signature: Any) -> Iterator[str]:
    """Yield the ids of a frozen signature's steps: what fails when it cannot start."""
    if not isinstance(signature, Mapping):
        return
    kind, kwargs = signature.get("subtask_type"), signature.get("kwargs") or {}
    if kind in ("group", "chain"):
        for task in kwargs.get("tasks", ()):
            yield from all_ids(task)
    elif kind == "chord":
        yield from all_ids(kwargs.get("body"))
    elif (signature.get("options") or {}).get("task_id"):
        yield signature["options"]["task_id"]


def ends_in_group(signature: Any) -> bool:
    """Tell whether a signature comes to a list of results, none of which has its id."""
    if not isinstance(signature, Mapping):
        return False
    kind, kwargs = signature.get("subtask_type"), signature.get("kwargs") or {}
    if kind == "chain":
        return ends_in_group((list(kwargs.get("tasks", ())) or [None])[-1])
    if kind == "chord":
        return ends_in_group(kwargs.get("body"))
    return kind == "group"
