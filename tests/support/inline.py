"""A worker inside the test's process: real messages, real requests, one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.concurrency.solo import TaskPool
from celery.exceptions import TaskRevokedError
from celery.utils.imports import symbol_by_name
from celery.worker import state
from celery.worker.request import Request, create_request_cls
from kombu.serialization import prepare_accept_content

from celery_pgbarrier import lease
from tests.support.brokers import Broker

__all__ = ["InlineWorker", "workers"]


class InlineWorker:
    """Takes messages from a broker and runs them as a solo worker's pool does.

    It is a boot of its own: two of them are two workers to the tables. ETAs are not waited for.
    Nothing beats, audits or reaps: a test does that itself, when it wants it.
    """

    def __init__(self, app: Celery, broker: Broker, name: str = "inline") -> None:
        self.app = app
        self.broker = broker
        self.name = name
        self.boot = lease.Boot()
        self.pool = TaskPool()
        with self.identity():
            lease.boot.begin(name)
            # Other processes of the test are not this one's children.
            os.environ.pop("PGBARRIER_WORKER", None)

    @contextmanager
    def identity(self) -> Iterator[None]:
        """Be this worker, for what is called directly."""
        before = lease.boot
        lease.boot = self.boot
        try:
            yield
        finally:
            lease.boot = before

    def take(self, queue: str | None = None) -> Request | None:
        """Receive one message; None where none waits. It is run by :meth:`run`."""
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            return self._take(channel, queue)

    def _take(self, channel: Any, queue: str | None) -> Request | None:
        message = self.app.amqp.queues[queue or self.broker.queue](channel).get()
        if message is None:
            return None
        message.accept = prepare_accept_content(self.app.conf.accept_content)
        # At once: nothing of these tests is about what the broker does with a message that was
        # never acknowledged.
        message.ack()
        return self.request(message)

    def request(self, message: Any) -> Request:
        """Make the request that a worker makes of a message."""
        task = self.app.tasks[message.headers["task"]]
        base = symbol_by_name(task.Request)
        cls = create_request_cls(base, task, self.pool, self.name, None, app=self.app)
        acked: list[bool] = []
        return cls(
            message,
            on_ack=lambda *_: acked.append(True),
            on_reject=lambda *_: acked.append(False),
            app=self.app,
            hostname=self.name,
            task=task,
            connection_errors=(OSError,),
            body=message.body,
            headers=dict(message.headers),
            decoded=False,
            utc=True,
        )

    def run(self, request: Request) -> Request:
        """Run a message that was taken; a revoked or expired one is dropped."""
        with self.identity():
            state.task_reserved(request)
            try:
                request.execute_using_pool(self.pool)
            except TaskRevokedError:
                pass
            finally:
                state.task_ready(request)
        return request

    def step(self, queue: str | None = None) -> Request | None:
        """Take and run one message; None where none waits."""
        request = self.take(queue)
        return self.run(request) if request is not None else None

    def drain(self, most: int = 2000, queue: str | None = None) -> int:
        """Run messages until none waits; return how many were run."""
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            for count in range(most):
                request = self._take(channel, queue)
                if request is None:
                    return count
                self.run(request)
        raise AssertionError(f"still messages after {most}")

    def take_all(self, queue: str | None = None) -> list[Request]:
        """Take what waits, to be run in another order, or never."""
        return list(iter(lambda: self.take(queue), None))


@contextmanager
def workers(app: Celery, broker: Broker) -> Iterator[Callable[..., InlineWorker]]:
    """A maker of inline workers; what they leave in this process is cleared at the end."""
    boot, variable = lease.boot, os.environ.get("PGBARRIER_WORKER")
    try:
        yield lambda name="inline": InlineWorker(app, broker, name)
    finally:
        lease.boot = boot
        os.environ.pop("PGBARRIER_WORKER", None)
        if variable is not None:
            os.environ["PGBARRIER_WORKER"] = variable
        state.reset_state()
