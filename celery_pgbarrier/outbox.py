"""What a committed unit sends: its messages, which are marked as published."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from celery_pgbarrier import dispatch
from celery_pgbarrier.store import sql
from celery_pgbarrier.store.tasks import array
from celery_pgbarrier.unit import Host, Unit

logger = logging.getLogger(__name__)


def publish(host: Host, unit: Unit) -> None:
    """Publish a committed unit's messages and mark them, batch by batch; nothing is raised."""
    messages, batch = unit.messages, host.settings.batch_size
    for start in range(0, len(messages), batch):
        chunk = messages[start : start + batch]
        taken = dispatch.publish(host.app, [(m.task_id, m.envelope) for m in chunk])
        mark_published(host, taken)
        if len(taken) < len(chunk):  # the broker is away: the reaper does the rest
            break
    for send in unit.sent_events:
        _quietly(partial(_send_event, host, send), "task-sent event")


def _send_event(host: Host, send: Callable[[Any], Any]) -> None:
    with host.app.producer_pool.acquire(block=True) as producer:
        send(producer)


def mark_published(host: Host, ids: list[str]) -> None:
    """Mark messages as published; where that fails, the reaper publishes them once more."""
    if ids:
        parameters = {"ids": array(ids), "after": host.settings.republish_after}
        mark = partial(host.database.count, sql.TASKS_PUBLISHED, parameters, 1.0)
        _quietly(mark, "marking messages as published")


def _quietly(work: Callable[[], Any], what: str) -> None:
    try:
        work()
    except Exception as error:
        logger.warning("%s failed, the reaper makes up for it: %s", what, error)
