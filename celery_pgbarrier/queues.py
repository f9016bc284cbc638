"""What the broker says of its queues."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from celery import Celery

from celery_pgbarrier import compat

logger = logging.getLogger(__name__)

#: How long a broker that is away is tried (connection attempts).
_TRIES = 1


def empty(app: Celery, names: Iterable[str]) -> set[str]:
    """Return those of some queues that are empty or gone; nothing where the broker is away.

    One question a queue: a passive declaration, or LLEN on Redis.  A queue that is gone counts
    where this app knows its name (a routing key of an exchange need not be the name of a queue),
    and is declared, which publishing on a connection that has declared it before does not repeat.
    """
    found: set[str] = set()
    try:
        with app.pool.acquire(block=True) as connection:
            connection.ensure_connection(max_retries=_TRIES, interval_start=0)
            for name in names:
                depth = _depth(connection, name)
                if depth is None and name in app.amqp.queues:
                    with connection.channel() as channel:
                        app.amqp.queues[name](channel).declare()
                    depth = 0
                if depth == 0:
                    found.add(name)
    except Exception as error:
        logger.warning("The broker's queues cannot be looked at: %r", error)
        return set()
    return found


def _depth(connection: Any, name: str) -> int | None:
    """Return how many messages wait in a queue, None where there is none of this name."""
    with connection.channel() as channel:
        try:
            return compat.queue_depth(channel, name)
        except connection.channel_errors as error:
            if str(getattr(error, "reply_code", "")) == "404":
                return None
            raise
