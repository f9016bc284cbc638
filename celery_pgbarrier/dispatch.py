"""From the outbox to the broker: the encoded message and the only publisher."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from kombu.utils.json import dumps, loads

from celery_pgbarrier import faults

logger = logging.getLogger(__name__)

#: The message header that carries the stamp.
STAMP = "pgb"
#: One quick second try, for a pooled connection that has gone stale; the reaper does the rest.
_RETRY_POLICY = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}


@dataclass(frozen=True)
class Envelope:
    """A task message as the broker gets it, with where it goes.

    ``declare`` holds the names of the queues to declare first; ``properties`` what else
    :meth:`kombu.Producer.publish` takes (priority, correlation id, expiration in seconds...).
    """

    body: bytes
    content_type: str
    content_encoding: str
    exchange: str
    routing_key: str
    headers: dict[str, Any]
    declare: list[str] = field(default_factory=list)
    properties: dict[str, Any] = field(default_factory=dict)

    @property
    def queue(self) -> str:
        """The queue that the message waits in, as well as it is known here."""
        return self.declare[0] if self.declare else self.routing_key

    def encode(self) -> bytes:
        """Return the envelope for the ``message`` column: a line of JSON, then the body."""
        fields = {key: value for key, value in vars(self).items() if key != "body"}
        head: str = dumps(fields)
        return head.encode() + b"\n" + self.body

    @classmethod
    def decode(cls, message: bytes) -> Envelope:
        """Read what :meth:`encode` wrote."""
        head, _, body = bytes(message).partition(b"\n")
        return cls(body=body, **loads(head.decode()))

    def copied(self, copy: int) -> Envelope:
        """Return the envelope with its stamp telling which copy of the message it is."""
        stamp = {**self.headers.get(STAMP, {}), "copy": copy}
        return replace(self, headers={**self.headers, STAMP: stamp})

    def request(self) -> dict[str, Any]:
        """Return the fields of the task request that a worker would make of the message."""
        from kombu.compression import decompress
        from kombu.serialization import loads as deserialize

        body: bytes = self.body
        if self.headers.get("compression"):
            body = decompress(body, self.headers["compression"])
        args, kwargs, embed = deserialize(
            body, self.content_type, self.content_encoding, accept=[self.content_type]
        )
        delivery = {"exchange": self.exchange, "routing_key": self.routing_key}
        return {
            **self.headers,
            **self.properties,
            "delivery_info": delivery,
            "args": args,
            "kwargs": kwargs,
            **(embed or {}),
        }


def publish(app: Celery, envelopes: Iterable[tuple[str, Envelope]]) -> list[str]:
    """Publish messages until the broker fails; return the ids of those that it took.

    What is not published stays recorded, and the reaper publishes it.  Nothing is raised.
    """
    published: list[str] = []
    try:
        with app.producer_pool.acquire(block=True) as producer:
            for task_id, envelope in envelopes:
                if _publish_one(app, producer, task_id, envelope):
                    published.append(task_id)
                if len(published) == 1:
                    faults.point("dispatch.half-published")
    except Exception as error:
        logger.warning("The broker is away, recorded messages are published later: %r", error)
    return published


def _publish_one(app: Celery, producer: Any, task_id: str, envelope: Envelope) -> bool:
    """Publish one message; False where the broker refuses this one, an error where it is away."""
    try:
        producer.publish(
            envelope.body,
            content_type=envelope.content_type,
            content_encoding=envelope.content_encoding,
            exchange=envelope.exchange,
            routing_key=envelope.routing_key,
            headers=dict(envelope.headers),
            declare=_queues(app, envelope),
            retry=True,
            retry_policy=dict(_RETRY_POLICY),
            **envelope.properties,
        )
    except (OperationalError, OSError, *producer.connection.connection_errors):
        raise
    except Exception as error:
        logger.error("The broker refuses the message of task %s: %r", task_id, error)
        return False
    return True


def _queues(app: Celery, envelope: Envelope) -> list[Any]:
    queues = []
    for name in envelope.declare:
        try:
            queues.append(app.amqp.queues[name])
        except KeyError:  # not configured here and task_create_missing_queues is off
            continue
    return queues
