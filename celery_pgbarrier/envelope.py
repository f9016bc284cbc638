"""A task message as it is recorded and as the broker gets it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kombu.utils.json import JSONEncoder, loads

#: The message header that carries the stamp: call, sequence, whether recorded (1 or 0), copy and
#: task id, with a space between.  Brokers' clients read a string many times faster than a table.
STAMP = "pgb"
#: The headers of Celery's task messages (protocol 2, ``celery.app.amqp.AMQP.as_task_v2``) and the
#: stamp: recorded without their names where all are there.
_HEADERS = (
    "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries",
    "timelimit", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result",
    "replaced_task_nesting", "stamped_headers", "stamps", STAMP,
)  # fmt: skip
_NAMES = set(_HEADERS)
_encoder: Any = JSONEncoder(separators=(",", ":"))


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

    @classmethod
    def delivered(
        cls,
        body: bytes,
        content: tuple[str, str],
        headers: dict[str, Any],
        delivery: Mapping[str, Any],
        **properties: Any,
    ) -> Envelope:
        """Return a message that a worker was given, so that it can be put back where it came from.

        Parameters:
            content: type and encoding of the body.
            delivery: exchange and routing key, as of ``request.delivery_info``.
            properties: those that are None are left out.
        """
        exchange = delivery.get("exchange") or ""
        routing_key = delivery.get("routing_key") or ""
        return cls(
            body=body,
            content_type=content[0],
            content_encoding=content[1],
            exchange=exchange,
            routing_key=routing_key,
            headers=headers,
            declare=[] if exchange else [routing_key],
            properties={
                "delivery_mode": 2,
                **{key: value for key, value in properties.items() if value is not None},
            },
        )

    @property
    def queue(self) -> str:
        """The queue that the message waits in, as well as it is known here."""
        return self.declare[0] if self.declare else self.routing_key

    def encode(self) -> bytes:
        """Return the envelope for the ``message`` column: a line of JSON, then the body.

        A row is written several times in a task's life, each time with its message: what is the
        same in all messages is left out.
        """
        known, others = None, self.headers
        if others.keys() >= _NAMES:
            known = [others[name] for name in _HEADERS]
            others = {name: value for name, value in others.items() if name not in _NAMES}
        head: str = _encoder.encode(
            [
                self.content_type,
                self.content_encoding,
                self.exchange,
                self.routing_key,
                self.declare,
                self.properties,
                known,
                others,
            ]
        )
        return head.encode() + b"\n" + self.body

    @classmethod
    def decode(cls, message: bytes) -> Envelope:
        """Read what :meth:`encode` wrote."""
        head, _, body = bytes(message).partition(b"\n")
        kind, encoding, exchange, routing_key, declare, properties, known, others = loads(
            head.decode()
        )
        headers = {**dict(zip(_HEADERS, known or (), strict=False)), **others}
        return cls(body, kind, encoding, exchange, routing_key, headers, declare, properties)

    def copied(self, copy: int) -> Envelope:
        """Return the envelope with its stamp telling which copy of the message it is."""
        stamp = self.headers.get(STAMP)
        if not isinstance(stamp, str):  # recorded by an earlier release
            return self.stamped({**(stamp or {}), "copy": copy})
        call, seq, recorded, _, task_id = stamp.split(" ", 4)
        return self.stamped(f"{call} {seq} {recorded} {copy} {task_id}")

    def stamped(self, stamp: str | dict[str, Any]) -> Envelope:
        """Return the envelope with another stamp."""
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
