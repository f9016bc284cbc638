"""Many messages to the broker at once: what :meth:`kombu.Producer.publish` sends, with less work.

And many acknowledgements: over AMQP their frames are written together too.

Three ways, the first that fits:

- AMQP (py-amqp): the frames of many messages are written together.  The format is AMQP 0-9-1
  (sections 2.3.5 and 4.2), the same bytes that :mod:`amqp` writes for each message by itself.
- transports with publish batches (kombu 5.7 and newer: Redis): kombu's own batch, a pipeline.
- everything else, and producers that somebody has replaced (tracing): message by message.

Queues are declared, connections opened and mended by whoever published a first message of the same
route through the producer itself; see :mod:`celery_pgbarrier.dispatch`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from struct import pack
from typing import Any, Protocol

from amqp.exceptions import AMQPError
from amqp.serialization import dumps
from kombu import Message, Producer
from kombu.transport.pyamqp import Channel

from celery_pgbarrier import compat
from celery_pgbarrier.envelope import Envelope

logger = logging.getLogger(__name__)

#: Bytes that are gathered before they are written: some 50 messages, less than a socket buffer.
_WRITE_AT = 65536
#: More messages than a batch ever holds: it is flushed here, not by kombu in the middle of one.
_MOST = 1_000_000
#: Header items that are remembered: most are the same in all messages of a chord.
_REMEMBERED = 500
_END = b"\xce"
#: Basic properties with their flag and whether they are an octet (AMQP 0-9-1, section 1.8).
_PROPERTIES = (
    ("delivery_mode", 0x1000, True),
    ("priority", 0x0800, True),
    ("correlation_id", 0x0400, False),
    ("reply_to", 0x0200, False),
    ("expiration", 0x0100, False),
)
_KNOWN = {name for name, _, _ in _PROPERTIES}
_publish = Producer.publish


class Sender(Protocol):
    """Sends messages of routes that are known to the broker; ``sent`` counts those that went."""

    sent: int

    def send(self, envelope: Envelope) -> None:
        """Send a message, now or with those that follow."""

    def flush(self) -> None:
        """Send what was kept back."""


@contextmanager
def sender(producer: Any) -> Iterator[Sender]:
    """Give the fastest sender for a producer; to be flushed by the caller."""
    if type(producer).publish is not _publish or producer.compression:
        yield _Single(producer)
    elif _frames_fit(producer.channel):
        yield _Frames(producer.channel)
    elif getattr(producer, "supports_batch_publish", False):
        with producer.batch(max_size=_MOST) as batch:
            yield _Batched(producer, batch)
    else:
        yield _Single(producer)


def arguments(envelope: Envelope) -> dict[str, Any]:
    """Return an envelope as arguments of :meth:`kombu.Producer.publish`, without the body."""
    return {
        "content_type": envelope.content_type,
        "content_encoding": envelope.content_encoding,
        "exchange": envelope.exchange,
        "routing_key": envelope.routing_key,
        "headers": dict(envelope.headers),
        **envelope.properties,
    }


class _Single:
    """Message by message, through the producer."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self.sent = 0

    def send(self, envelope: Envelope) -> None:
        self._producer.publish(envelope.body, **arguments(envelope))
        self.sent += 1

    def flush(self) -> None:
        """Nothing is kept back here."""


class _Batched:
    """Through the producer into a batch of kombu's."""

    def __init__(self, producer: Any, batch: Any) -> None:
        self._producer = producer
        self._batch = batch
        self._kept = 0
        self.sent = 0

    def send(self, envelope: Envelope) -> None:
        self._producer.publish(envelope.body, **arguments(envelope))
        self._kept += 1

    def flush(self) -> None:
        self._batch.flush()
        self.sent += self._kept
        self._kept = 0


def acknowledge(messages: Sequence[Message]) -> bool:
    """Acknowledge messages of one channel, written together; False where that cannot be.

    Nothing is raised: where the connection is lost, the broker brings the messages again.
    """
    channel = messages[0].channel
    if type(channel) is not Channel or not channel.is_open or channel.no_ack_consumers:
        return False
    if any(message.channel is not channel or message.acknowledged for message in messages):
        return False
    frames = bytearray()
    for message in messages:
        frames += _frame(channel, 1, pack(">HHQB", 60, 80, message.delivery_tag, 0))
        compat.set_acknowledged(message)
    try:
        channel.connection.transport.write(bytes(frames))
    except (OSError, AMQPError) as error:
        logger.warning("%d messages are not acknowledged: %r", len(messages), error)
    return True


def _frame(channel: Any, kind: int, payload: bytes) -> bytes:
    return pack(">BHI", kind, channel.channel_id, len(payload)) + payload + _END


def _frames_fit(channel: Any) -> bool:
    """Tell whether frames may be written to a channel: py-amqp's, without confirmations."""
    if type(channel) is not Channel or not channel.is_open:
        return False
    return not getattr(channel.connection, "confirm_publish", True)


class _Frames:
    """The frames of many messages, written together."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._transport = channel.connection.transport
        self._most = channel.connection.frame_max - 8
        self._buffer = bytearray()
        self._kept = 0
        self._items: dict[Any, bytes] = {}
        self.sent = 0

    def send(self, envelope: Envelope) -> None:
        if _is_plain(envelope):
            self._buffer += self._method(envelope) + self._content(envelope)
        else:
            self.flush()
            self._publish(envelope)
        self._kept += 1
        if len(self._buffer) >= _WRITE_AT:
            self.flush()

    def flush(self) -> None:
        if self._buffer:
            try:
                self._transport.write(bytes(self._buffer))
            except BaseException:
                # A part of it may be out: whatever followed would be read as the rest of it.
                self._channel.connection.collect()
                raise
            finally:
                self._buffer.clear()
        self.sent += self._kept
        self._kept = 0

    def _publish(self, envelope: Envelope) -> None:
        Producer(self._channel, auto_declare=False).publish(envelope.body, **arguments(envelope))

    def _method(self, envelope: Envelope) -> bytes:
        key = (envelope.exchange, envelope.routing_key)
        found = self._items.get(key)
        if found is None:
            route = _short(envelope.exchange) + _short(envelope.routing_key)
            found = self._items[key] = _frame(
                self._channel, 1, pack(">HHH", 60, 40, 0) + route + b"\0"
            )
        return found

    def _content(self, envelope: Envelope) -> bytes:
        body = envelope.body
        header = pack(">HHQ", 60, 0, len(body)) + self._properties(envelope)
        frames = [_frame(self._channel, 2, header)]
        for start in range(0, len(body), self._most):
            frames.append(_frame(self._channel, 3, body[start : start + self._most]))
        return b"".join(frames)

    def _properties(self, envelope: Envelope) -> bytes:
        table = self._table(envelope.headers)
        kind = _short(envelope.content_type) + _short(envelope.content_encoding)
        flags, parts = 0xE000, [kind, pack(">I", len(table)), table]
        values = {"priority": 0, **envelope.properties}
        if "expiration" in values:
            values["expiration"] = str(int(values["expiration"] * 1000))
        for name, flag, octet in _PROPERTIES:
            if name in values:
                flags |= flag
                parts.append(pack("B", values[name]) if octet else _short(values[name]))
        return pack(">H", flags) + b"".join(parts)

    def _table(self, table: Mapping[str, Any]) -> bytes:
        return b"".join([self._item(key, value) for key, value in table.items()])

    def _item(self, key: str, value: Any) -> bytes:
        if type(value) is dict:
            inner = self._table(value)
            return _short(key) + b"F" + pack(">I", len(inner)) + inner
        if type(value) not in (str, int, bool, type(None)):
            return _library_item(key, value)
        remembered = (key, type(value), value)
        found = self._items.get(remembered)
        if found is None:
            found = _string(key, value) if type(value) is str else _library_item(key, value)
            if len(self._items) < _REMEMBERED:
                self._items[remembered] = found
        return found


def _is_plain(envelope: Envelope) -> bool:
    """Tell whether a message has nothing that only the library knows how to write."""
    mode = envelope.properties.get("delivery_mode")
    plain = type(mode) is int and envelope.properties.keys() <= _KNOWN
    return plain and bool(envelope.content_type and envelope.content_encoding)


def _short(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return pack("B", len(encoded)) + encoded


def _string(key: str, value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return _short(key) + b"S" + pack(">I", len(encoded)) + encoded


def _library_item(key: str, value: Any) -> bytes:
    """Return one item of a table as the library writes it, without the table's length."""
    written: bytes = dumps("F", [{key: value}])
    return written[4:]
