"""A chord's life: opened with its messages, member finished, released or failed.

Each step is one transaction; what it records is published after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from sqlalchemy import Connection

from celery_pgbarrier import dispatch, faults
from celery_pgbarrier.errors import (
    DatabaseRetryLater,
    DatabaseUnavailable,
    DispatchConflict,
    DispatchUnknown,
)
from celery_pgbarrier.store import sql, tasks
from celery_pgbarrier.store.database import Database
from celery_pgbarrier.unit import (
    STAMP,
    Barrier,
    HandOver,
    Host,
    Message,
    Outcome,
    Stamp,
    Unit,
)

logger = logging.getLogger(__name__)


class Refused(Exception):
    """The primary write of a unit was refused by its fence; the transaction is rolled back."""


@dataclass
class Committed:
    """What a committed unit leaves to do: barriers to release."""

    ready: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Closing:
    """A barrier that is being released: its body and its members' encoded metadata in order."""

    id: str
    call: str
    body: bytes
    structure: bytes | None
    members: list[tuple[str, bytes | None]]


class Releasing(Host, Protocol):
    """A host that can turn a complete barrier into what follows."""

    def closing_unit(self, closing: Closing) -> tuple[str, Unit]:
        """Return the barrier's last state ("released" or "failed") and what to record."""
        ...


# -- writing a unit


def _outcome_parameters(host: Host, outcome: Outcome) -> dict[str, Any]:
    fence = outcome.fence
    stamp = fence.stamp
    return {
        "id": outcome.task_id,
        "status": outcome.status,
        "result": outcome.result,
        "visible": outcome.visible,
        "write_token": outcome.write_token,
        "expires": host.keep,
        "token": fence.token,
        "worker": fence.worker,
        "pid": fence.pid,
        "call": stamp.call if stamp else None,
        "seq": stamp.seq if stamp else 0,
        "may_insert": not (stamp and stamp.recorded),
    }


def _outcome_statement(outcome: Outcome) -> str:
    return sql.FINISH if outcome.fence.token else sql.RECORD


def _write_outcome(connection: Connection, host: Host, outcome: Outcome) -> tuple[bool, str | None]:
    """Write an outcome; return whether it was accepted and the barrier that it completed."""
    clause = host.database.sql[_outcome_statement(outcome)]
    row = connection.execute(clause, _outcome_parameters(host, outcome)).one()
    return bool(row.accepted), row.ready


def _write_hand_over(connection: Connection, host: Host, step: HandOver, unit: Unit) -> bool:
    message = next((m for m in unit.messages if m.task_id == step.task_id), None)
    parameters = {
        "id": step.task_id,
        "token": step.token,
        "call": step.stamp.call,
        "seq": step.stamp.seq,
        "status": step.status,
        "result": step.result,
        "message": _encoded(message, step.stamp) if message else None,
        "queue": message.envelope.queue if message else None,
        "eta": message.eta if message else None,
        "grace": host.settings.publish_grace,
    }
    return connection.execute(host.database.sql[sql.HAND_OVER], parameters).rowcount == 1


def _encoded(message: Message, stamp: Stamp) -> bytes:
    message.envelope.headers[STAMP] = stamp.header(message.task_id)
    return message.envelope.encode()


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


def _rows(unit: Unit) -> list[tasks.Row]:
    """Return the rows of all messages and expected members of a unit."""
    place: dict[str, tuple[str | None, int | None, int | None]] = {}
    for barrier in unit.barriers:
        members = unit.members_of(barrier)
        slots = tasks.slots_for(len(members))
        for position, task_id in enumerate(members):
            place[task_id] = (barrier.id, position % slots, position)
    handed = unit.primary.task_id if isinstance(unit.primary, HandOver) else None
    rows, seen = [], {handed}
    for message in unit.messages:
        if message.task_id in seen:
            continue
        seen.add(message.task_id)
        call = unit.call_of(message.task_id)
        barrier_id, slot, position = place.get(message.task_id) or (None, None, None)
        rows.append(
            tasks.Row(
                message.task_id,
                call,
                barrier_id,
                slot,
                position,
                message.name,
                message.envelope.queue,
                _encoded(message, Stamp(call, 0, True)),
                message.eta,
            )
        )
    for task_id, (barrier_id, slot, position) in place.items():
        if task_id not in seen:
            rows.append(tasks.Row(task_id, unit.call_of(task_id), barrier_id, slot, position))
    return rows


def _open(connection: Connection, host: Host, unit: Unit, barrier: Barrier) -> str | None:
    """Open a barrier; return its id where it is complete from the start (no members)."""
    members = unit.members_of(barrier)
    opened = tasks.open_barrier(
        connection,
        host.database.sql,
        barrier.id,
        unit.call_of(barrier.id),
        len(members),
        barrier.body,
        barrier.structure,
    )
    if opened is None:
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
    ready = [_write_primary(connection, host, unit)]
    for _, outcome in sorted(unit.outcomes.items()):
        ready.append(_write_outcome(connection, host, outcome)[1])
    ready += [_open(connection, host, unit, barrier) for barrier in unit.barriers]
    settings = host.settings
    foreign = tasks.record(
        connection, host.database.sql, _rows(unit), settings.publish_grace, settings.batch_size
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
        outcome = unit.primary
        statement, parameters = _outcome_statement(outcome), _outcome_parameters(host, outcome)
        row = host.database.statement(statement, parameters, patience)[0]
        if row.accepted:
            return Committed([row.ready] if row.ready else [])
        return _settled(host.database, unit, patience)
    try:
        return host.database.transaction(lambda conn: write(conn, host, unit), patience)
    except Refused:
        return _settled(host.database, unit, patience)


def _settled(database: Database, unit: Unit, patience: float) -> Committed | None:
    """Tell a refusal from an own commit whose answer was lost."""
    primary = unit.primary
    assert primary is not None
    token = primary.write_token if isinstance(primary, Outcome) else primary.token
    found = database.statement(sql.SETTLED, {"id": primary.task_id, "write_token": token}, patience)
    return Committed() if found[0][0] else None


def publish(host: Host, unit: Unit) -> None:
    """Publish a committed unit's messages and mark them; nothing is raised."""
    messages = unit.messages
    if messages:
        taken = dispatch.publish(host.app, [(m.task_id, m.envelope) for m in messages])
        mark_published(host, taken)
    for send in unit.sent_events:
        _quietly(partial(_send_event, host, send), "task-sent event")


def _send_event(host: Host, send: Callable[[Any], Any]) -> None:
    with host.app.producer_pool.acquire(block=True) as producer:
        send(producer)


def mark_published(host: Host, ids: list[str]) -> None:
    """Mark messages as published; where that fails, the reaper publishes them once more."""
    settings = host.settings
    for start in range(0, len(ids), settings.batch_size):
        parameters = {
            "ids": ids[start : start + settings.batch_size],
            "after": settings.republish_after,
        }
        mark = partial(host.database.count, sql.TASKS_PUBLISHED, parameters, 1.0)
        _quietly(mark, "marking messages as published")


def _quietly(work: Callable[[], Any], what: str) -> None:
    try:
        work()
    except Exception as error:
        logger.warning("%s failed, the reaper makes up for it: %s", what, error)


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
    publish(host, unit)
    for barrier_id in committed.ready:
        release(host, barrier_id)


def follow(host: Releasing, unit: Unit, committed: Committed) -> None:
    """Do what a committed outcome leaves to do: publish, release, run inline errbacks."""
    faults.point("finish.committed")
    publish(host, unit)
    for barrier_id in committed.ready:
        release(host, barrier_id)
    for errback in unit.inline:
        errback()


def release(host: Releasing, barrier_id: str) -> bool:
    """Release a complete barrier: record its body (or its failure) once, then publish.

    Nothing is raised where PostgreSQL is away: the reaper takes a ready barrier up.
    """
    outcome: list[tuple[Unit, Committed]] = []

    def work(connection: Connection) -> None:
        outcome.clear()
        statements = host.database.sql
        row = connection.execute(statements[sql.BARRIER_LOCK], {"id": barrier_id}).first()
        if row is None:
            return
        members = connection.execute(statements[sql.BARRIER_MEMBERS], {"id": barrier_id})
        closing = Closing(
            row.id,
            row.call,
            bytes(row.body),
            None if row.structure is None else bytes(row.structure),
            [(m.id, None if m.result is None else bytes(m.result)) for m in members],
        )
        state, unit = host.closing_unit(closing)
        committed = write(connection, host, unit)
        connection.execute(
            statements[sql.BARRIER_CLOSE],
            {"id": barrier_id, "state": state, "expires": host.keep},
        )
        outcome.append((unit, committed))

    try:
        host.database.transaction(work, host.settings.dispatch_timeout)
    except DatabaseUnavailable as error:
        logger.warning("Chord %s is complete and is released later: %s", barrier_id, error)
        return False
    for unit, committed in outcome:
        faults.point("release.committed")
        follow(host, unit, committed)
    return bool(outcome)
