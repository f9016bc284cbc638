"""Poison: tasks that are not run any more, how they are found, and how they are put back."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from celery.utils.dispatch import Signal
from sqlalchemy import Connection, Row

from celery_pgbarrier import reference
from celery_pgbarrier.dispatch import RETRY_POLICY
from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.errors import DispatchConflict, NotPoisoned
from celery_pgbarrier.lease import inspect, publish_recorded
from celery_pgbarrier.store import sql, tasks
from celery_pgbarrier.unit import STAMP, Host, Poison, Stamp, all_ids

logger = logging.getLogger(__name__)

#: Sent after a task was failed for good and kept: ``task_id``, ``name``, ``reason``. It is sent in
#: the process that failed it: a worker's parent or whoever runs the reaper.
task_poisoned = Signal(name="task_poisoned", providing_args={"task_id", "name", "reason"})


def announce(host: Host, poison: Poison) -> None:
    """Tell of a task that was failed for good: a log line, the signal, Celery's event."""
    logger.error(
        "Task %s[%s] is poison and is not run again: %s (celery -A proj pgbarrier poison list)",
        poison.name, poison.task_id, poison.reason,
    )  # fmt: skip
    task_poisoned.send(
        sender=host.app, task_id=poison.task_id, name=poison.name, reason=poison.reason
    )
    fields = {"uuid": poison.task_id, "exception": poison.reason, "name": poison.name}
    try:
        with host.app.producer_pool.acquire(block=True) as producer:
            host.app.events.Dispatcher(enabled=False).publish(
                "task-failed", fields, producer, retry=True, retry_policy=dict(RETRY_POLICY)
            )
    except Exception as error:
        logger.warning("The event of poison task %s is not sent: %r", poison.task_id, error)


def listed(host: Host, limit: int = 100) -> list[Row[Any]]:
    """Return what is kept, the latest first.

    Each row has ``id``, ``name``, ``queue``, ``crashes``, ``reason``, ``poisoned_at``,
    ``barrier_id`` and ``barrier_state`` (of the chord it was a member of).
    """
    return host.database.statement(sql.POISON_LIST, {"limit": limit})


@dataclass(frozen=True)
class Retried:
    """What putting a task back came to: ``rejoined`` tells that its chord waits for it again."""

    task_id: str
    rejoined: bool


class _ShutMeanwhile(Exception):
    """The chord of a task closed while the task was being put back."""


def retry(host: Host, task_id: str) -> Retried:
    """Put a poison task back: a new run of the same id, with its crashes forgotten.

    Steps of ``self.transaction()`` that it has committed stay done.

    A member whose chord still waits for others is counted again when it ends. A chord that has
    failed stays failed: the task runs, with its links and the next steps of its chain, and counts
    for nothing.

    Raises:
        NotPoisoned: no such task is kept.
        DispatchConflict: the id runs again already, or a chord that waits for a later step of the
            task's chain has counted that step and is still open.
        DatabaseUnavailable: PostgreSQL is away.
    """
    call = str(uuid.uuid4())
    patience = host.settings.dispatch_timeout
    try:
        try:
            work = partial(_put_back, host, task_id, call, True)
            rejoined = host.database.transaction(work, patience)
        except _ShutMeanwhile:
            work = partial(_put_back, host, task_id, call, False)
            rejoined = host.database.transaction(work, patience)
    except NotPoisoned:
        held = inspect(host, task_id, patience)
        if held is None or held.call != call:
            raise
        rejoined = held.barrier_id is not None  # the answer to an earlier COMMIT was lost
    publish_recorded(host, [task_id])
    return Retried(task_id, rejoined)


def _put_back(host: Host, task_id: str, call: str, rejoin: bool, connection: Connection) -> bool:
    statements = host.database.sql
    row = connection.execute(statements[sql.POISON_LOCK], {"id": task_id}).first()
    if row is None:
        raise NotPoisoned(
            f"task {task_id} is not kept as poison: see `celery -A proj pgbarrier poison list`"
        )
    envelope = Envelope.decode(row.message)
    envelope.headers[STAMP] = Stamp(call, 0, True).header(task_id)
    _refuse_counted_steps(connection, host, envelope)
    message = envelope.encode()
    joined = rejoin and _rejoin(connection, host, row, call, message)
    if not joined:
        reads = reference.read_by(envelope.request()["args"])
        again = tasks.Row(
            row.id, call, name=row.name, queue=row.queue, message=message, reads=reads
        )
        _record(connection, host, again)
    held = {"id": task_id, "held": row.call, "call": call}
    connection.execute(statements[sql.EFFECTS_CARRY], held)
    connection.execute(statements[sql.POISON_DELETE], {"id": task_id})
    return joined


def _rejoin(connection: Connection, host: Host, row: Row[Any], call: str, message: bytes) -> bool:
    grace = host.settings.publish_grace
    parameters = {"id": row.id, "held": row.call, "call": call, "message": message, "grace": grace}
    done = connection.execute(host.database.sql[sql.POISON_REJOIN], parameters).one()
    if done.shut:
        raise _ShutMeanwhile
    return bool(done.joined)


def _record(connection: Connection, host: Host, row: tasks.Row) -> None:
    waits = tasks.Waits(host.settings.publish_grace, host.settings.republish_after)
    if tasks.record(connection, host.database.sql, [row], waits, 1) is not None:
        raise DispatchConflict(
            f"task {row.id} cannot be put back now: it runs again already, or its chord is just "
            "being closed"
        )


def _refuse_counted_steps(connection: Connection, host: Host, envelope: Envelope) -> None:
    later = {"ids": _later_steps(envelope)}
    step = connection.execute(host.database.sql[sql.POISON_LATER], later).scalar()
    if step is not None:
        raise DispatchConflict(
            f"an open chord has counted the failure of {step}, a later step of this task's chain: "
            "wait until that chord has closed"
        )


def _later_steps(envelope: Envelope) -> Sequence[str]:
    try:
        chain = envelope.request().get("chain") or ()
    except Exception:  # a body that cannot be read here may be readable where it runs
        return []
    return [task_id for step in chain for task_id in all_ids(step)]
