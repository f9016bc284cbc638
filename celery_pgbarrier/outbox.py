"""What a committed unit sends: its messages, and the word that they are published.

Members of small chords are recorded as published, and one row a barrier says that this is still to
be done: it is deleted at the end.  Other messages are marked, batch by batch; what follows from a
task's outcome is marked a moment later where the worker has somebody for that, and needs no mark
then if it has been claimed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from celery_pgbarrier import dispatch
from celery_pgbarrier.store import sql
from celery_pgbarrier.store.tasks import FEW, array
from celery_pgbarrier.unit import Host, Unit

logger = logging.getLogger(__name__)

#: In a worker that has a clerk: takes ids of published messages to be marked a moment later, and
#: tells whether it did.
marked_later: Callable[[list[str]], bool] | None = None


def publish(host: Host, unit: Unit, soon: bool = False) -> None:
    """Publish a committed unit's messages and say so, batch by batch; nothing is raised.

    Parameters:
        soon: whether these messages are likely to be claimed at once.
    """
    messages, batch = unit.messages, host.settings.batch_size
    for start in range(0, len(messages), batch):
        chunk = messages[start : start + batch]
        refused: dict[str, Exception] = {}
        envelopes = [(m.task_id, m.envelope) for m in chunk]
        taken = set(dispatch.publish(host.app, envelopes, refused))
        sent = [m.task_id for m in chunk if m.task_id in taken and not m.presumed]
        if not (soon and sent and _marked_later(sent)):
            mark_published(host, sent)
        missed = [m for m in chunk if m.task_id not in taken]
        if any(m.presumed for m in chunk):  # all that are stand in one batch
            unsent = [m.task_id for m in missed if m.presumed]
            _quietly(partial(_confirm, host, unit, unsent), "saying that a chord is published")
        if len(missed) > len(refused):  # the broker is away: the reaper does the rest
            break
    for send in unit.sent_events:
        _quietly(partial(_send_event, host, send), "task-sent event")


def _confirm(host: Host, unit: Unit, unsent: list[str]) -> None:
    """Tell of all messages of a unit's barriers but *unsent* that they are published."""
    database, settings = host.database, host.settings
    if unsent:
        parameters = {"ids": unsent, "after": settings.publish_grace}
        database.count(sql.TASKS_UNPUBLISHED, parameters, 1.0)
    ids = [barrier.id for barrier in unit.barriers]
    calls = array(unit.call_of(barrier_id) for barrier_id in ids)
    database.count(sql.DISPATCH_DONE, {"ids": array(ids), "calls": calls}, 1.0)


def _send_event(host: Host, send: Callable[[Any], Any]) -> None:
    with host.app.producer_pool.acquire(block=True) as producer:
        send(producer)


def mark_published(host: Host, ids: list[str]) -> None:
    """Mark messages as published; where that fails, the reaper publishes them once more."""
    if ids:
        parameters = {"ids": array(ids), "after": host.settings.republish_after}
        statement = sql.TASKS_PUBLISHED_FEW if len(ids) <= FEW else sql.TASKS_PUBLISHED
        mark = partial(host.database.count, statement, parameters, 1.0)
        _quietly(mark, "marking messages as published")


def mark_unclaimed(host: Host, ids: list[str]) -> None:
    """Mark messages that were published a moment ago and have not been claimed since."""
    batch = host.settings.batch_size
    for start in range(0, len(ids), batch):
        chunk = ids[start : start + batch]
        parameters = {"ids": array(chunk), "after": host.settings.republish_after}
        mark = partial(host.database.count, sql.TASKS_PUBLISHED_BEFORE, parameters, 1.0)
        _quietly(mark, "marking messages as published")


def _marked_later(ids: list[str]) -> bool:
    try:
        return marked_later is not None and marked_later(ids)
    except Exception as error:  # a soft time limit, say: there is more to do
        logger.warning("Messages are marked as published at once: %r", error)
        return False


def _quietly(work: Callable[[], Any], what: str) -> None:
    try:
        work()
    except Exception as error:
        logger.warning("%s failed, the reaper makes up for it: %s", what, error)
