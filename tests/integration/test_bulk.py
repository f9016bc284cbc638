"""Messages that are published many at once are those that kombu would send one by one."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from kombu import Producer

from celery_pgbarrier import bulk, dispatch
from celery_pgbarrier.envelope import Envelope
from tests.support.brokers import Broker


def envelope(queue: str, body: bytes = b"[[], {}, {}]", **properties: Any) -> Envelope:
    task_id = str(uuid.uuid4())
    headers = {
        "id": task_id, "task": "tests.add", "retries": 0, "eta": None, "timelimit": [None, 2.5],
        "argsrepr": "('\u00e9\U0001f600',)", "origin": "", "ignore_result": False, "yes": True,
        "one": 1, "big": 2**40, "stamps": {}, "nested": {"a": [1, {"b": None}], "c": {"d": "e"}},
    }  # fmt: skip
    given = {"delivery_mode": 2, "correlation_id": task_id, "reply_to": "x", **properties}
    return Envelope(body, "application/json", "utf-8", "", queue, headers, [queue], given)


def envelopes(queue: str) -> list[Envelope]:
    plain = [envelope(queue, b"[[%d], {}, {}]" % number) for number in range(300)]
    special = [
        envelope(queue, priority=7),
        envelope(queue, expiration=3600.5),
        envelope(queue, delivery_mode=1),
        envelope(queue, delivery_mode="transient"),
        envelope(queue, message_id="mine", app_id="ours"),
        envelope(queue, b"x" * 300_000),
        envelope(queue, b""),
    ]
    return plain[:150] + special + plain[150:]


def fetch(app: Celery, queue: str) -> dict[str, tuple[Any, ...]]:
    """Take all messages off a queue: what a consumer sees of each, by task id."""
    seen: dict[str, tuple[Any, ...]] = {}
    own = ("delivery_tag", "delivery_info", "body_encoding")
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        simple = app.amqp.queues[queue](channel)
        while (message := simple.get(no_ack=True)) is not None:
            properties = {k: v for k, v in message.properties.items() if k not in own}
            body = bytes(message.body, "utf-8") if isinstance(message.body, str) else message.body
            seen[message.headers["id"]] = (
                bytes(body), message.content_type, message.content_encoding,
                message.headers, properties,
            )  # fmt: skip
    return seen


@pytest.fixture
def brokered(make_app: Callable[..., Celery], each_broker: Broker, database_url: str) -> Celery:
    return make_app(each_broker, f"pgbarrier+{database_url}")


def test_bulk_sends_what_kombu_sends(brokered: Celery, each_broker: Broker) -> None:
    """Headers of every type, properties, large and empty bodies, on real brokers."""
    queue, messages = each_broker.queue, envelopes(each_broker.queue)
    taken = dispatch.publish(brokered, [(m.headers["id"], m) for m in messages])
    assert sorted(taken) == sorted(m.headers["id"] for m in messages)
    many = fetch(brokered, queue)
    with brokered.producer_pool.acquire(block=True) as producer:
        for message in messages:
            producer.publish(message.body, **bulk.arguments(message))
    one_by_one = fetch(brokered, queue)
    assert set(many) == {m.headers["id"] for m in messages}
    assert many == one_by_one


def test_messages_are_acknowledged_together(brokered: Celery, each_broker: Broker) -> None:
    """Over AMQP; what was left over comes again, and the channel goes on."""
    queue = each_broker.queue
    sent = [envelope(queue) for _ in range(20)]
    dispatch.publish(brokered, [(m.headers["id"], m) for m in sent])
    with brokered.connection_for_read() as connection:
        bound = brokered.amqp.queues[queue](connection.channel())
        messages = [bound.get() for _ in sent]
        done, left = messages[::2], messages[1::2]
        together = bulk.acknowledge(done)
        assert together is (connection.transport.driver_type == "amqp")
        assert {message.acknowledged for message in done} == {together}
        if together:
            assert not bulk.acknowledge(messages[:3]), "one of them is acknowledged"
        else:
            for message in done:
                message.ack()
        assert not any(message.acknowledged for message in left)
        assert bound.get() is None
    assert set(fetch(brokered, queue)) == {message.headers["id"] for message in left}


def test_each_broker_has_its_fast_way(brokered: Celery, each_broker: Broker) -> None:
    """Frames for RabbitMQ; for Redis kombu's batches, where this kombu has them."""
    dispatch.publish(brokered, [("first", envelope(each_broker.queue))])
    with brokered.producer_pool.acquire(block=True) as producer, bulk.sender(producer) as sender:
        kind = type(sender).__name__
    if each_broker.url.startswith("redis"):
        assert kind == ("_Batched" if hasattr(producer, "batch") else "_Single")
    else:
        assert kind == "_Frames"


def test_messages_keep_their_order(brokered: Celery, each_broker: Broker) -> None:
    messages = envelopes(each_broker.queue)
    taken = dispatch.publish(brokered, [(m.headers["id"], m) for m in messages])
    ordinary = [m.headers["id"] for m in messages if "priority" not in m.properties]
    assert taken == [m.headers["id"] for m in messages]
    assert [i for i in fetch(brokered, each_broker.queue) if i in set(ordinary)] == ordinary


def test_a_message_that_cannot_be_sent_does_not_stop_the_others(
    brokered: Celery, each_broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [envelope(each_broker.queue) for _ in range(5)]
    messages[2] = envelope(each_broker.queue, expiration="soon")
    taken = dispatch.publish(brokered, [(m.headers["id"], m) for m in messages])
    assert taken == [m.headers["id"] for m in messages if m is not messages[2]]
    assert set(fetch(brokered, each_broker.queue)) == set(taken)
    assert "refuses" in caplog.text


def test_a_producer_that_was_replaced_sees_every_message(
    brokered: Celery, each_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing libraries wrap ``Producer.publish``."""
    seen: list[str] = []
    original = Producer.publish

    def traced(self: Any, body: Any, **options: Any) -> Any:
        seen.append(options["headers"]["id"])
        return original(self, body, **options)

    monkeypatch.setattr(Producer, "publish", traced)
    messages = [envelope(each_broker.queue) for _ in range(5)]
    taken = dispatch.publish(brokered, [(m.headers["id"], m) for m in messages])
    assert seen == taken == [m.headers["id"] for m in messages]


def test_a_broker_with_confirmations_confirms_every_message(
    make_app: Callable[..., Celery], each_broker: Broker, database_url: str
) -> None:
    confirming = Broker(
        each_broker.url,
        each_broker.queue,
        {**each_broker.transport_options, "confirm_publish": True},
    )
    app = make_app(confirming, f"pgbarrier+{database_url}")
    messages = envelopes(each_broker.queue)[:20]
    taken = dispatch.publish(app, [(m.headers["id"], m) for m in messages])
    assert each_broker.depth() == len(taken) == 20


def test_a_soft_time_limit_is_not_taken_for_the_brokers_refusal(
    brokered: Celery, each_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the publishing task, and the connection where a part of a write may be out."""
    messages = [(m.headers["id"], m) for m in (envelope(each_broker.queue) for _ in range(5))]
    assert len(dispatch.publish(brokered, messages)) == 5

    def limited(*_: Any, **__: Any) -> None:
        raise SoftTimeLimitExceeded

    with monkeypatch.context() as patch:
        with brokered.producer_pool.acquire(block=True) as producer:
            if each_broker.url.startswith("redis"):
                patch.setattr(Producer, "publish", limited)
            else:
                patch.setattr(type(producer.channel.connection.transport), "write", limited)
        with pytest.raises(SoftTimeLimitExceeded):
            dispatch.publish(brokered, messages)
    assert len(dispatch.publish(brokered, messages)) == 5
