"""From the outbox to the broker: the only publisher."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import OperationalError

from celery_pgbarrier import bulk, faults
from celery_pgbarrier.envelope import Envelope

logger = logging.getLogger(__name__)

#: One quick second try, for a pooled connection that has gone stale; the reaper does the rest.
RETRY_POLICY = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}

_Messages = list[tuple[str, Envelope]]
_Refused = dict[str, Exception]


def publish(
    app: Celery, envelopes: Iterable[tuple[str, Envelope]], refused: _Refused | None = None
) -> list[str]:
    """Publish messages until the broker fails; return the ids of those that it took.

    What is not published stays recorded, and the reaper publishes it.  Nothing is raised but the
    soft time limit of a task that publishes.

    Parameters:
        refused: gets the errors of those that the broker refuses, by id.
    """
    published: list[str] = []
    refused = {} if refused is None else refused
    left = list(envelopes)
    while left:
        before = len(published)
        try:
            _publish(app, left, published, refused)
            break
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:
            if len(published) == before:
                logger.warning("The broker is away, messages are published later: %r", error)
                break
            # It took some: the connection was lost. A new one takes the rest, if there is one.
            logger.info("The broker was lost amid messages, they go on: %r", error)
        done = {*published, *refused}
        left = [(task_id, envelope) for task_id, envelope in left if task_id not in done]
    return published


def _publish(app: Celery, envelopes: _Messages, published: list[str], refused: _Refused) -> None:
    """Publish messages and take down which ones; an error tells that the broker is away."""
    with app.producer_pool.acquire(block=True) as producer:
        firsts, rest = _by_route(envelopes)
        for task_id, envelope in firsts:
            if _publish_one(app, producer, task_id, envelope, refused):
                published.append(task_id)
            if len(published) == 1:
                faults.point("dispatch.half-published")
        if rest:
            _publish_rest(producer, rest, published, refused)


def _by_route(envelopes: Iterable[tuple[str, Envelope]]) -> tuple[_Messages, _Messages]:
    """Return the first message of each route, whose queue is declared with it, and the rest."""
    firsts: _Messages = []
    rest: _Messages = []
    seen: set[tuple[str, str, tuple[str, ...]]] = set()
    for task_id, envelope in envelopes:
        route = (envelope.exchange, envelope.routing_key, tuple(envelope.declare))
        (rest if route in seen else firsts).append((task_id, envelope))
        seen.add(route)
    return firsts, rest


def _publish_rest(
    producer: Any, messages: _Messages, published: list[str], refused: _Refused
) -> None:
    """Publish messages whose routes are known to the broker, many at once."""
    given: list[str] = []
    with bulk.sender(producer) as sender:
        try:
            for task_id, envelope in messages:
                try:
                    sender.send(envelope)
                except Exception as error:
                    _unless_refused(producer, task_id, error, refused)
                else:
                    given.append(task_id)
            sender.flush()
        finally:
            published += given[: sender.sent]


def _publish_one(
    app: Celery, producer: Any, task_id: str, envelope: Envelope, refused: _Refused
) -> bool:
    """Publish one message; False where the broker refuses this one, an error where it is away."""
    try:
        producer.publish(
            envelope.body,
            declare=_queues(app, envelope),
            retry=True,
            retry_policy=dict(RETRY_POLICY),
            **bulk.arguments(envelope),
        )
    except Exception as error:
        _unless_refused(producer, task_id, error, refused)
        return False
    return True


def _unless_refused(producer: Any, task_id: str, error: Exception, refused: _Refused) -> None:
    """Take down that the broker refuses a message; raise an error that tells that it is away."""
    if isinstance(error, SoftTimeLimitExceeded):
        raise error
    away = (OperationalError, OSError, *producer.connection.connection_errors)
    if isinstance(error, away):
        raise error
    logger.error("The broker refuses the message of task %s: %r", task_id, error)
    refused[task_id] = error


def _queues(app: Celery, envelope: Envelope) -> list[Any]:
    queues = []
    for name in envelope.declare:
        try:
            queues.append(app.amqp.queues[name])
        except KeyError:  # not configured here and task_create_missing_queues is off
            continue
    return queues
