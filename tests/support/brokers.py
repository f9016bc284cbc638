"""A corner of a broker for each test: nobody else's messages, nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import redis
from amqp.exceptions import NotFound
from kombu import Connection
from kombu.transport import virtual

# The broker gives the messages of a dead worker back at once, not after an hour.
FAST_REDELIVERY = {
    "visibility_timeout": 3,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}


@dataclass(frozen=True)
class Broker:
    """Where a test's messages go. ``settings()`` is what an app needs to join."""

    url: str
    queue: str
    transport_options: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Celery settings that keep an app inside this corner."""
        return {
            "broker_url": self.url,
            "task_default_queue": self.queue,
            "broker_transport_options": self.transport_options,
        }

    def connection(self) -> Connection:
        """A kombu connection; a context manager."""
        return Connection(self.url, transport_options=self.transport_options, connect_timeout=5)

    def depth(self, queue: str | None = None) -> int:
        """How many messages wait in the queue, those in a worker's hands not counted."""
        with self.connection() as connection, connection.channel() as channel:
            if isinstance(channel, virtual.Channel):
                # A passive declaration forgets the key prefix.
                return int(channel._size(queue or self.queue))
            try:
                return int(channel.queue_declare(queue or self.queue, passive=True).message_count)
            except NotFound:
                return 0

    def purge(self, queue: str | None = None) -> int:
        """Lose every message that waits in the queue; how many there were."""
        with self.connection() as connection, connection.channel() as channel:
            try:
                return int(channel.queue_purge(queue or self.queue) or 0)
            except NotFound:
                return 0


def new_queue() -> str:
    """A queue name that no other test uses."""
    return f"pgbarrier-test-{uuid.uuid4().hex[:12]}"


def private_broker(url: str, **transport_options: Any) -> Broker:
    """The ``Broker`` of a server that is the test's own, where nothing need be kept apart."""
    return Broker(url, "celery", transport_options)


@contextmanager
def redis_corner(url: str) -> Iterator[Broker]:
    """A key prefix of a Redis server that others use too.

    A queue of its own would not do: kombu keeps the unacknowledged messages of all queues in one
    hash, so one test's worker would restore the messages of another.
    """
    name = new_queue()
    prefix = f"{name}."
    yield Broker(url, name, {"global_keyprefix": prefix})
    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter(match=f"{prefix}*", count=1000):
            client.delete(key)


@contextmanager
def rabbitmq_corner(url: str) -> Iterator[Broker]:
    """A queue of a RabbitMQ virtual host; it and what Celery made for it are deleted."""
    broker = Broker(url, new_queue())
    yield broker
    with broker.connection() as connection:
        for method in ("queue_delete", "exchange_delete"):
            # A channel is closed by an error, such as that there is none.
            with suppress(NotFound), connection.channel() as channel:
                getattr(channel, method)(broker.queue)


@contextmanager
def virtual_host(url: str) -> Iterator[str]:
    """The URL of a new virtual host where ``rabbitmqctl`` works, else ``url`` itself.

    Workers broadcast to every worker of their virtual host, so two test processes had better not
    share one.
    """
    name, parts = new_queue(), urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost") or not _rabbitmqctl("add_vhost", name):
        yield url
        return
    try:
        _rabbitmqctl("set_permissions", "-p", name, parts.username or "guest", ".*", ".*", ".*")
        yield f"{parts.scheme}://{parts.netloc}/{name}"
    finally:
        _rabbitmqctl("delete_vhost", name)


def _rabbitmqctl(*arguments: str) -> bool:
    program = shutil.which("rabbitmqctl")
    if program is None:
        return False
    try:
        done = subprocess.run([program, "--quiet", *arguments], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
