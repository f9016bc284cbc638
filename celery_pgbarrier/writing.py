"""A unit is written in its caller's transaction: outcomes, hand-overs, barriers, rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from celery_pgbarrier.errors import DispatchConflict
from celery_pgbarrier.store import direct, sql, tasks
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

#: What publishing one message may take before the reaper helps (seconds). Whole calls of 1,000
#: members, recording included, took 1.0 to 1.5 ms a member.
_PER_MESSAGE = 0.002
#: What it usually takes (seconds): 1,000 messages to RabbitMQ took 0.1 to 0.25 s.
_PUBLISHING = 0.00025


class Refused(Exception):
    """The primary write of a unit was refused by its fence; the transaction is rolled back."""


@dataclass
class Committed:
    """What a committed unit leaves to do: barriers to release."""

    ready: list[str] = field(default_factory=list)


def outcome_parameters(host: Host, outcome: Outcome) -> dict[str, Any]:
    """Return the parameters of all statements that write an outcome."""
    fence = outcome.fence
    stamp = fence.stamp
    return {
        "id": outcome.task_id,
        "status": outcome.stored_status,
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


def outcome_statements(outcome: Outcome) -> tuple[str, ...]:
    """Return what writes an outcome: the short statement of the usual case, then the long one."""
    fence = outcome.fence
    if fence.token is not None:
        return (sql.FINISH_MEMBER if fence.barrier else sql.FINISH_ALONE), sql.FINISH
    if fence.worker is not None:
        return (sql.RECORD,)
    return (sql.RECORD_ROW if fence.has_row else sql.RECORD_ALONE), sql.RECORD


def _write_outcome(connection: Connection, host: Host, outcome: Outcome) -> tuple[bool, str | None]:
    """Write an outcome; return whether it was accepted and the barrier that it completed."""
    parameters = outcome_parameters(host, outcome)
    for statement in outcome_statements(outcome):
        row = connection.execute(host.database.sql[statement], parameters).first()
        if row is not None:
            return True, row.ready
    return False, None


def batch_parameters(host: Host, units: Iterable[Unit]) -> dict[str, Any]:
    """Return the parameters of the statements that write the outcomes of many claimed tasks."""
    outcomes = [unit.primary for unit in units if isinstance(unit.primary, Outcome)]
    return {
        "ids": tasks.array(outcome.task_id for outcome in outcomes),
        "tokens": tasks.array(outcome.fence.token for outcome in outcomes),
        "statuses": tasks.array(outcome.stored_status for outcome in outcomes),
        "results": tasks.array(outcome.result for outcome in outcomes),
        "write_tokens": tasks.array(outcome.write_token for outcome in outcomes),
        "expires": host.keep,
        "barriers": tasks.array({o.fence.barrier for o in outcomes if o.fence.barrier}),
    }


def write_batch(
    connection: Connection, host: Host, statement: str, units: Mapping[str, Unit]
) -> list[Any]:
    """Write outcomes of many claimed tasks, by task id, with the messages that follow from them.

    Returns the statement's rows: ids of those whose outcome was accepted, barriers that are ready.

    Raises:
        DispatchConflict: an id is in use by another call; nothing is to be committed.
    """
    statements = host.database.sql
    rows = direct.rows(connection, statements, statement, batch_parameters(host, units.values()))
    accepted = [units[row.id] for row in rows if row.id in units]
    twice = _twice(message.task_id for unit in accepted for message in unit.messages)
    if twice is not None:  # one statement cannot record both
        raise DispatchConflict(f"task id {twice} is sent by two tasks at once")
    count = sum(len(unit.events) for unit in accepted)
    settings = host.settings
    waits = tasks.Waits(settings.publish_grace + _PER_MESSAGE * count, settings.republish_after)
    new = (row for unit in accepted for row in _rows(unit, False))
    _record(connection, host, new, waits)
    return rows


def _record(
    connection: Connection, host: Host, rows: Iterable[tasks.Row], waits: tasks.Waits
) -> None:
    foreign = tasks.record(connection, host.database.sql, rows, waits, host.settings.batch_size)
    if foreign is not None:
        raise DispatchConflict(f"task id {foreign} is used again while its first run goes on")


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


def waits_for(host: Host, unit: Unit) -> tasks.Waits:
    """Return when a unit's messages are due, given that they are published one after another.

    In a large unit each batch is marked when it is published: how far its producer got, and what
    others published meanwhile, matters there.
    """
    settings, count = host.settings, len(unit.events)
    presumed = count * _PUBLISHING if count <= settings.batch_size + 1 else None
    grace = settings.publish_grace + _PER_MESSAGE * count
    return tasks.Waits(grace, settings.republish_after, presumed)


def _places(unit: Unit) -> dict[str, tuple[str, int, int]]:
    """Return the barrier, slot and position of each member that a unit's barriers wait for."""
    places: dict[str, tuple[str, int, int]] = {}
    for barrier in unit.barriers:
        members = unit.members_of(barrier)
        slots = tasks.slots_for(len(members))
        for position, task_id in enumerate(members):
            places[task_id] = (barrier.id, position % slots, position)
    return places


def _rows(unit: Unit, presumed: bool) -> Iterator[tasks.Row]:
    """Yield the rows of all messages and expected members of a unit."""
    places = _places(unit)
    own = unit.primary.task_id if isinstance(unit.primary, HandOver) else None
    messages = {message.task_id: message for message in unit.messages}
    for message in messages.values():
        if message.task_id == own:  # its row is written with the claim's end
            continue
        barrier_id, slot, position = places.pop(message.task_id, (None, None, None))
        message.presumed = presumed and barrier_id is not None
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
    twice = _twice(members)
    if twice is not None:
        raise DispatchConflict(
            f"the header of chord {barrier.id} holds task id {twice} twice: clone the signature "
            "and give the clone an id of its own"
        )


def _twice(ids: Iterable[str]) -> str | None:
    """Return an id that comes more than once, None where there is none."""
    return next((task_id for task_id, count in Counter(ids).items() if count > 1), None)


def _open(
    connection: Connection, host: Host, unit: Unit, barrier: Barrier, waits: tasks.Waits
) -> str | None:
    """Open a barrier; return its id where it is complete from the start (no members)."""
    members = unit.members_of(barrier)
    _refuse_twice(barrier, members)
    body_ids = list(dict.fromkeys(all_ids(barrier.body_signature)))
    body_calls = [unit.call_of(task_id) for task_id in body_ids]
    call = unit.call_of(barrier.id)
    new = tasks.New(
        barrier.id, call, len(members), barrier.body, barrier.structure, body_ids, body_calls, waits
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
    waits = waits_for(host, unit)
    ready += [_open(connection, host, unit, barrier, waits) for barrier in unit.barriers]
    _record(connection, host, _rows(unit, waits.presumed is not None), waits)
    return Committed([barrier_id for barrier_id in ready if barrier_id])
