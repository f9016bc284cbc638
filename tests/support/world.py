"""A canvas, three ways: claimed tasks on our backend, plain ones on ours, plain ones on Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from celery import Celery
from celery.result import GroupResult

from celery_pgbarrier.backend import BarrierBackend
from tests.support import databases, tasks
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker, workers
from tests.support.tables import Tables
from tests.support.tasks import plain

__all__ = ["KINDS", "World", "open_world", "value"]

claimed = SimpleNamespace(**{name: getattr(tasks, name) for name in vars(plain)})
KINDS = {"claimed": claimed, "plain": plain, "redis": plain}


@dataclass
class World:
    """A backend, tasks of one kind, a worker, and a file for what tasks tell."""

    kind: str
    t: Any
    app: Celery
    worker: InlineWorker
    path: Path
    tables: Tables | None

    @property
    def ours(self) -> bool:
        return isinstance(self.app.backend, BarrierBackend)

    def nothing_open(self) -> bool:
        """Whether every barrier is closed and every message was used up."""
        if self.tables is None:
            return True
        open_ones = self.tables.count("barrier", "state IN ('waiting', 'ready')")
        return not open_ones and not self.tables.count("task", "state <> 'done'")


@contextmanager
def open_world(
    kind: str,
    make_app: Callable[..., Celery],
    broker: Broker,
    database_url: str,
    path: Path,
    redis: Broker | None = None,
    **settings: Any,
) -> Iterator[World]:
    """An app on Redis or on our backend ("claimed", "plain"), with an inline worker.

    ``redis`` is where the Redis backend keeps its results: by default where its messages are.
    """
    redis = redis or broker
    ours = kind != "redis"
    if ours:
        url = databases.backend_url(database_url)
    else:  # in the corner of the broker, so that nothing is left behind
        url = redis.url
        settings["result_backend_transport_options"] = redis.transport_options
    app = make_app(broker, url, **settings)
    if kind != "claimed":
        app.task_cls = "celery.app.task:Task"  # also for Celery's own tasks
    with workers(app, broker) as make:
        yield World(kind, KINDS[kind], app, make(), path, Tables(database_url) if ours else None)
    if not ours:
        consumer = app.backend.result_consumer
        consumer.stop()
        consumer._pubsub = None  # or each result that is collected later connects again
        app.backend.client.connection_pool.disconnect()


def value(result: Any) -> Any:
    """What a result has come to; looked up, for ``get`` would open connections to Redis."""
    if isinstance(result, GroupResult):
        return [value(child) for child in result.results]
    assert result.state == "SUCCESS", (result.state, result.result)
    return result.result
