"""A chord's life: opened with its messages, member finished, released or failed.

Each step is one transaction; what it records is published after it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from sqlalchemy import Connection

from celery_pgbarrier import faults, outbox, reference
from celery_pgbarrier.errors import (
    DatabaseRetryLater,
    DatabaseUnavailable,
    DispatchConflict,
    DispatchUnknown,
)
from celery_pgbarrier.reference import Page
from celery_pgbarrier.store import sql, tasks
from celery_pgbarrier.store.database import Database
from celery_pgbarrier.unit import (
    Barrier,
    Fence,
    HandOver,
    Host,
    Outcome,
    Stamp,
    Unit,
    all_ids,
)

logger = logging.getLogger(__name__)

#: What publishing one message may take before the reaper helps (seconds). Whole calls of 1,000
#: members, recording included, took 1.0 to 1.5 ms a member.
_PER_MESSAGE = 0.002


class Refused(Exception):
    """The primary write of a unit was refused by its fence; the transaction is rolled back."""


@dataclass
class Committed:
    """What a committed unit leaves to do: barriers to release."""

    ready: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Closing:
    """A barrier that is being released, with its members' encoded metadata.

    ``size`` is the header's, ``count`` that of all members, ``bytes`` what their metadata amount
    to.  ``members`` and ``doubtful`` give pages of ids and metadata in header order: of all
    members, and of those that may have failed.
    """

    id: str
    call: str
    body: bytes
    structure: bytes | None
    size: int
    count: int
    bytes: int
    members: Callable[[], Iterator[Page]]
    doubtful: Callable[[], Iterator[Page]]


class Releasing(Host, Protocol):
    """A host that can turn a complete barrier into what follows."""

    def closing_unit(
        self, closing: Closing, refused: DispatchConflict | None = None
    ) -> tuple[str, Unit]:
        """Return the barrier's last state ("released" or "failed") and what to record."""
        ...


# -- writing a unit


def _outcome_parameters(host: Host, outcome: Outcome) -> dict[str, Any]:
    fence = outcome.fence
    stamp = fence.stamp
    return {
        "id": outcome.task_id,
        "status": outcome.status if outcome.visible else "PENDING",
        "result": outcome.result,
        "write_token": outcome.write_token,
        "expires": host.keep,
        "token": fence.token,
        "barrier": fence.barrier,
        "attempt": fence.attempt,
        "worker": fence.worker,
        "pid": fence.pid,
        "call": stamp.call if stamp else None,
        "seq": stamp.seq if stamp else 0,
        "may_insert": not (stamp and stamp.recorded),
    }


def _outcome_statements(outcome: Outcome) -> tuple[str, ...]:
    """Return what writes an outcome: the short statement of the usual case, then the long one."""
    fence = outcome.fence
    if fence.token is not None:
        return (sql.FINISH_MEMBER if fence.barrier else sql.FINISH_ALONE), sql.FINISH
    if fence.worker is not None:
        return (sql.RECORD,)
    return (sql.RECORD_ROW if fence.has_row else sql.RECORD_ALONE), sql.RECORD


def _write_outcome(connection: Connection, host: Host, outcome: Outcome) -> tuple[bool, str | None]:
    """Write an outcome; return whether it was accepted and the barrier that it completed."""
    parameters = _outcome_parameters(host, outcome)
    for statement in _outcome_statements(outcome):
        row = connection.execute(host.database.sql[statement], parameters).first()
        if row is not None:
            return True, row.ready
    return False, None


def _write_hand_over(connection: Connection, host: Host, step: HandOver, unit: Unit) -> bool:
    message = unit.message_of(step.task_id)
    if message is not None:
        message.stamp(step.stamp)
    held = step.fence.stamp or step.stamp
    parameters = {
        "id": step.task_id,
        "token": step.fence.token,
        "attempt": step.fence.attempt,
        "held_call": held.call,
        "held_seq": held.seq,
        "call": step.stamp.call,
        "seq": step.stamp.seq,
        "status": step.status,
        "result": step.result,
        "message": message.encoded if message else None,
        "queue": message.queue if message else None,
        "eta": message.eta if message else None,
        "grace": host.settings.publish_grace,
    }
    return connection.execute(host.database.sql[sql.HAND_OVER], parameters).rowcount == 1


def _write_primary(connection: Connection, host: Host, unit: Unit) -> str | None:
    """Write what the unit stands or falls with; return the barrier that it completed."""
    primary, ready = unit.primary, None
    if isinstance(primary, Outcome):
        accepted, ready = _write_outcome(connection, host, primary)
    elif isinstance(primary, HandOver):
        accepted = _write_hand_over(connection, host, primary, unit)
    else:
        accepted = True
    if not accepted:
        raise Refused
    return ready


def _places(unit: Unit) -> dict[str, tuple[str, int, int]]:
    """Return the barrier, slot and position of each member that a unit's barriers wait for."""
    places: dict[str, tuple[str, int, int]] = {}
    for barrier in unit.barriers:
        members = unit.members_of(barrier)
        slots = tasks.slots_for(len(members))
        for position, task_id in enumerate(members):
            places[task_id] = (barrier.id, position % slots, position)
    return places


def _rows(unit: Unit) -> Iterator[tasks.Row]:
    """Yield the rows of all messages and expected members of a unit."""
    places = _places(unit)
    own = unit.primary.task_id if isinstance(unit.primary, HandOver) else None
    messages = {message.task_id: message for message in unit.messages}
    for message in messages.values():
        if message.task_id == own:  # its row is written with the claim's end
            continue
        barrier_id, slot, position = places.pop(message.task_id, (None, None, None))
        yield tasks.Row(
            message.task_id,
            unit.call_of(message.task_id),
            barrier_id,
            slot,
            position,
            name=message.name,
            queue=message.queue,
            message=message.encoded,
            eta=message.eta,
            reads=message.reads,
        )
    for task_id, place in places.items():
        yield tasks.Row(task_id, unit.call_of(task_id), *place)


def _refuse_twice(barrier: Barrier, members: list[str]) -> None:
    """Refuse a chord whose header holds an id twice."""
    if len(set(members)) == len(members):
        return
    twice = next(task_id for task_id, n in Counter(members).items() if n > 1)
    raise DispatchConflict(
        f"the header of chord {barrier.id} holds task id {twice} twice: clone the signature "
        "and give the clone an id of its own"
    )


def _open(connection: Connection, host: Host, unit: Unit, barrier: Barrier) -> str | None:
    """Open a barrier; return its id where it is complete from the start (no members)."""
    members = unit.members_of(barrier)
    _refuse_twice(barrier, members)
    body_ids = list(dict.fromkeys(all_ids(barrier.body_signature)))
    body_calls = [unit.call_of(task_id) for task_id in body_ids]
    call = unit.call_of(barrier.id)
    new = tasks.New(
        barrier.id, call, len(members), barrier.body, barrier.structure, body_ids, body_calls
    )
    opened, live = tasks.open_barrier(connection, host.database.sql, new)
    if live is not None:
        raise DispatchConflict(
            f"task {live} of the body of chord {barrier.id} still runs for an earlier call: "
            "clone the signature, or wait until it has finished"
        )
    if not opened:
        raise DispatchConflict(
            f"chord {barrier.id} is used again while its first run goes on: "
            "clone the signature, or wait until the first run has finished"
        )
    return None if members else barrier.id


def write(connection: Connection, host: Host, unit: Unit) -> Committed:
    """Write a unit in the caller's transaction.

    Lock order: own task, its slot, its barrier; other outcomes by task id; then new rows.  Members
    are added before the own outcome can empty the slot that they go into.

    Raises:
        Refused: the primary write lost to its fence.
        DispatchConflict: an id is in use by another call.
    """
    for addition in unit.additions:
        connection.execute(
            host.database.sql[sql.MEMBER_ADD],
            {"id": addition.task_id, "barrier": addition.barrier, "adder": addition.adder},
        )
    if unit.poison is not None:
        kept = {"id": unit.poison.task_id, "reason": unit.poison.reason, "expires": host.keep}
        connection.execute(host.database.sql[sql.POISON_KEEP], kept)
    ready = [_write_primary(connection, host, unit)]
    for task_id, outcome in sorted(unit.outcomes.items()):
        # A task of this id that another call is running has nothing to do with this unit.
        outcome.fence = Fence(stamp=Stamp(unit.call_of(task_id)))
        ready.append(_write_outcome(connection, host, outcome)[1])
    ready += [_open(connection, host, unit, barrier) for barrier in unit.barriers]
    grace = host.settings.publish_grace + _PER_MESSAGE * len(unit.events)
    foreign = tasks.record(
        connection, host.database.sql, _rows(unit), grace, host.settings.batch_size
    )
    if foreign is not None:
        raise DispatchConflict(f"task id {foreign} is used again while its first run goes on")
    return Committed([barrier_id for barrier_id in ready if barrier_id])


# -- committing a unit and what follows


def commit(host: Host, unit: Unit, patience: float) -> Committed | None:
    """Commit a unit; None when its primary write was refused (nothing is written then).

    Raises:
        DatabaseUnavailable: out of patience (seconds), nothing committed.
        DatabaseRetryLater: out of patience, it is unknown whether it was committed.
    """
    if isinstance(unit.primary, Outcome) and unit.plain:
        parameters = _outcome_parameters(host, unit.primary)
        for statement in _outcome_statements(unit.primary):
            rows = host.database.statement(statement, parameters, patience)
            if rows:
                return Committed([rows[0].ready] if rows[0].ready else [])
    else:
        try:
            return host.database.transaction(lambda conn: write(conn, host, unit), patience)
        except Refused:
            pass
    return _settled(host.database, unit, patience) or _unclaimed(host, unit, patience)


def _settled(database: Database, unit: Unit, patience: float) -> Committed | None:
    """Tell a refusal from an own commit whose answer was lost."""
    primary = unit.primary
    assert primary is not None
    parameters = {"id": primary.task_id, "write_token": primary.write_token}
    return Committed() if database.statement(sql.SETTLED, parameters, patience)[0][0] else None


def _unclaimed(host: Host, unit: Unit, patience: float) -> Committed | None:
    """Write the outcome of a task whose row, made by its own claim, a crash of the server took.

    Nobody else has the task then: it had no row before, and rows are purged long after they end.
    """
    primary = unit.primary
    assert primary is not None
    fence = primary.fence
    if fence.token is None or fence.stamp is None or fence.stamp.recorded or fence.attempt != 1:
        return None
    parameters = {"id": primary.task_id, "worker": None}
    if host.database.statement(sql.INSPECT, parameters, patience)[0].state is not None:
        return None
    if isinstance(primary, Outcome):
        primary.fence = Fence(stamp=fence.stamp)
        return commit(host, unit, patience)
    unit.primary = None  # a retry or replacement: its message makes the row anew
    return commit(host, unit, patience)


def open_chords(host: Releasing, unit: Unit) -> None:
    """Record and publish a canvas with its barriers: the end of a chord call.

    Raises:
        DatabaseUnavailable: PostgreSQL is away; nothing is recorded and nothing is published.
        DispatchUnknown: the answer to COMMIT was lost and PostgreSQL is still away.
        DispatchConflict: an id is in use by another call.
    """
    if not unit.events:
        return
    faults.point("dispatch.captured")
    try:
        committed = commit(host, unit, host.settings.dispatch_timeout)
    except DatabaseRetryLater as error:
        ids = ", ".join(barrier.id for barrier in unit.barriers)
        raise DispatchUnknown(
            f"PostgreSQL did not answer the COMMIT of chord {ids}: look it up when it is back; "
            f"the chord is whole or was never there ({error})"
        ) from error
    faults.point("dispatch.committed")
    assert committed is not None
    outbox.publish(host, unit)
    for barrier_id in committed.ready:
        release(host, barrier_id)


def follow(host: Releasing, unit: Unit, committed: Committed) -> None:
    """Do what a committed outcome leaves to do: publish, release, run inline errbacks."""
    faults.point("finish.committed")
    outbox.publish(host, unit)
    for barrier_id in committed.ready:
        release(host, barrier_id)
    for errback in unit.inline:
        errback()


def release(host: Releasing, barrier_id: str) -> bool:
    """Release a complete barrier: record its body (or its failure) once, then publish.

    Nothing is raised where PostgreSQL is away: the reaper takes a ready barrier up.
    """
    patience = host.settings.dispatch_timeout
    try:
        try:
            released = host.database.transaction(partial(_close, host, barrier_id, None), patience)
        except DispatchConflict as refused:
            close = partial(_close, host, barrier_id, refused)
            released = host.database.transaction(close, patience)
    except DatabaseUnavailable as error:
        logger.warning("Chord %s is complete and is released later: %s", barrier_id, error)
        return False
    if released is None:
        return False
    faults.point("release.committed")
    follow(host, *released)
    return True


def _close(
    host: Releasing, barrier_id: str, refused: DispatchConflict | None, connection: Connection
) -> tuple[Unit, Committed] | None:
    """Record what a complete barrier leads to; None where another process is releasing it."""
    statements = host.database.sql
    row = connection.execute(statements[sql.BARRIER_LOCK], {"id": barrier_id}).first()
    if row is None:
        return None
    pages = partial(_pages, connection, host, row)
    closing = Closing(
        row.id,
        row.call,
        bytes(row.body),
        None if row.structure is None else bytes(row.structure),
        row.size,
        row.members,
        int(row.bytes),
        partial(pages, row.members, sql.BARRIER_MEMBERS),
        partial(pages, row.doubtful, sql.BARRIER_DOUBTFUL),
    )
    state, unit = host.closing_unit(closing, refused)
    committed = write(connection, host, unit)
    parameters = {"id": barrier_id, "state": state, "expires": host.keep}
    connection.execute(statements[sql.BARRIER_CLOSE], parameters)
    return unit, committed


def _pages(
    connection: Connection, host: Host, barrier: Any, count: int, statement: str
) -> Iterator[Page]:
    """Read members, *count* in all, page by page, so that no more than a page is held here."""
    if not count:
        return
    for start, stop in reference.windows(barrier.size, host.settings.batch_size):
        window = {"id": barrier.id, "start": start, "stop": stop}
        rows = connection.execute(host.database.sql[statement], window)
        yield [(row.id, None if row.result is None else bytes(row.result)) for row in rows]
