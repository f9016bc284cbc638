"""Rows of ``pgbarrier_task`` and ``pgbarrier_barrier`` inside a transaction of the caller."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from celery_pgbarrier.store import direct, sql
from celery_pgbarrier.store.sql import Statements

#: Slots per barrier: the square root of its size, so that a slot row and the barrier row are each
#: locked by about as many members; at most as many as there can usefully be connections.
_MOST_SLOTS = 256
#: Up to how many rows the plan that a function keeps is good enough.
FEW = 100


def slots_for(size: int) -> int:
    """Return over how many slots the count of *size* members is spread."""
    return max(1, min(math.ceil(math.sqrt(size)), _MOST_SLOTS))


@dataclass(frozen=True)
class Waits:
    """When recorded messages are due (seconds from now).

    Those that are not marked as published, or whose barrier's are not, after ``grace``; those that
    nobody has claimed after ``after``.  ``presumed``: when those of a barrier will be published,
    None where each is marked.
    """

    grace: float
    after: float
    presumed: float | None = None


@dataclass(frozen=True)
class Row:
    """A task to record: with a message it is queued, without one expected."""

    id: str
    call: str
    barrier_id: str | None = None
    slot: int | None = None
    position: int | None = None
    name: str | None = None
    queue: str | None = None
    message: bytes | None = None
    eta: str | None = None
    reads: str | None = None


def record(
    connection: Connection,
    statements: Statements,
    rows: Iterable[Row],
    waits: Waits,
    batch: int,
) -> str | None:
    """Insert rows in batches; return an id that another call uses, None if there is none."""
    rows = iter(rows)
    while chunk := list(islice(rows, batch)):
        columns: Mapping[str, Any] = {
            "ids": array(row.id for row in chunk),
            "calls": array(row.call for row in chunk),
            "barriers": array(row.barrier_id for row in chunk),
            "member_slots": array(row.slot for row in chunk),
            "positions": array(row.position for row in chunk),
            "names": array(row.name for row in chunk),
            "queues": array(row.queue for row in chunk),
            "messages": array(row.message for row in chunk),
            "etas": array(row.eta for row in chunk),
            "reads": array(row.reads for row in chunk),
            "grace": waits.grace,
            "after": waits.after,
            "presumed": waits.presumed,
        }
        statement = sql.TASKS_RECORD_FEW if len(chunk) <= FEW else sql.TASKS_RECORD
        (taken,) = direct.rows(connection, statements, statement, columns)
        if taken.recorded == len(chunk):
            continue
        ids = {key: columns[key] for key in ("ids", "calls", "barriers")}
        foreign: str | None = connection.execute(statements[sql.TASKS_FOREIGN], ids).scalar()
        if foreign is not None:
            return foreign
    return None


def array(values: Iterable[str | bytes | int | None]) -> str:
    """Return an array as PostgreSQL reads it (manual, 8.15.2).

    A driver would send it as an expression of as many constants, which costs the server, and the
    driver, more than all else in the statement.
    """
    return "{" + ",".join([_element(value) for value in values]) + "}"


def _element(value: str | bytes | int | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f'"\\\\x{value.hex()}"'
    if isinstance(value, int):
        return str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True)
class New:
    """A barrier to open, and the tasks of its body with the calls that they belong to."""

    id: str
    call: str
    size: int
    body: bytes
    structure: bytes | None
    body_ids: Sequence[str]
    body_calls: Sequence[str]
    waits: Waits


def open_barrier(
    connection: Connection, statements: Statements, barrier: New
) -> tuple[bool, str | None]:
    """Open a barrier with its slots; a second time for the same call changes nothing.

    Returns whether it is open for this call (False: another call's barrier of this id is still
    open, or its results are still read), and a task of its body that runs for another call.
    """
    slots = slots_for(barrier.size)
    remaining = [len(range(slot, barrier.size, slots)) for slot in range(slots)]
    parameters: dict[str, Any] = {
        "id": barrier.id,
        "call": barrier.call,
        "size": barrier.size,
        "slots": slots,
        "state": "waiting" if barrier.size else "ready",
        "body": barrier.body,
        "structure": barrier.structure,
        "remaining": array(remaining),
        "body_ids": array(barrier.body_ids),
        "body_calls": array(barrier.body_calls),
        "grace": barrier.waits.grace,
        "presumed": barrier.waits.presumed if barrier.size else None,
    }
    (row,) = direct.rows(connection, statements, sql.BARRIER_OPEN, parameters)
    if row.fresh is None:
        mine = {"id": barrier.id}
        return connection.execute(statements[sql.BARRIER_CALL], mine).scalar() == barrier.call, None
    if not row.fresh:
        connection.execute(statements[sql.BARRIER_RESET], {"id": barrier.id, "slots": slots})
    return True, row.live
