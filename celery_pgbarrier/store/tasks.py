"""Rows of ``pgbarrier_task`` and ``pgbarrier_barrier`` inside a transaction of the caller."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import Connection

from celery_pgbarrier.store import sql
from celery_pgbarrier.store.sql import Statements

#: Slots per barrier: the square root of its size, so that a slot row and the barrier row are each
#: locked by about as many members; at most as many as there can usefully be connections.
_MOST_SLOTS = 256


def slots_for(size: int) -> int:
    """Return over how many slots the count of *size* members is spread."""
    return max(1, min(math.ceil(math.sqrt(size)), _MOST_SLOTS))


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
    connection: Connection, statements: Statements, rows: Iterable[Row], grace: float, batch: int
) -> str | None:
    """Insert rows in batches; return an id that another call uses, None if there is none."""
    rows = iter(rows)
    while chunk := list(islice(rows, batch)):
        columns: Mapping[str, Any] = {
            "ids": array(row.id for row in chunk),
            "calls": array(row.call for row in chunk),
            "barriers": array(row.barrier_id for row in chunk),
            "slots": array(row.slot for row in chunk),
            "positions": array(row.position for row in chunk),
            "names": array(row.name for row in chunk),
            "queues": array(row.queue for row in chunk),
            "messages": array(row.message for row in chunk),
            "etas": array(row.eta for row in chunk),
            "reads": array(row.reads for row in chunk),
            "grace": grace,
        }
        taken = connection.execute(statements[sql.TASKS_RECORD], columns).rowcount
        if taken == len(chunk):
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


def open_barrier(
    connection: Connection,
    statements: Statements,
    barrier_id: str,
    call: str,
    size: int,
    body: bytes,
    structure: bytes | None,
) -> bool | None:
    """Open a barrier with its slots.

    Returns True when it is open now, False when the same call opened it before (nothing is
    changed), None when another call's barrier of this id is still open.
    """
    slots = slots_for(size)
    parameters: dict[str, Any] = {
        "id": barrier_id,
        "call": call,
        "size": size,
        "slots": slots,
        "state": "waiting" if size else "ready",
        "body": body,
        "structure": structure,
    }
    if connection.execute(statements[sql.BARRIER_OPEN], parameters).first() is None:
        existing = connection.execute(statements[sql.BARRIER_CALL], {"id": barrier_id}).scalar()
        return False if existing == call else None
    connection.execute(statements[sql.BARRIER_RESET], {"id": barrier_id})
    remaining = [len(range(slot, size, slots)) for slot in range(slots)]
    connection.execute(
        statements[sql.SLOTS_OPEN],
        {"id": barrier_id, "slots": list(range(slots)), "remaining": remaining},
    )
    return True
