"""What the integration tests share: one app on one database and one broker, seen from all sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_pgbarrier.backend import BarrierBackend
from tests.support import databases, pgbouncer, tasks
from tests.support.brokers import Broker
from tests.support.charges import TABLE
from tests.support.inline import InlineWorker, workers
from tests.support.services import Services
from tests.support.tables import Tables, close_pools
from tests.support.waiting import wait_until
from tests.support.wire import Wire
from tests.support.world import KINDS, World, open_world

__all__ = ["InlineWorker"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "settings(**settings): what the app's test adds to it")


@pytest.fixture(autouse=True)
def no_connections_left() -> Iterator[None]:
    """Close the pools that the backends of a test have opened in this process."""
    yield
    tasks.hooks.clear()
    close_pools()


@pytest.fixture(scope="module")
def module_database(
    services: Services, postgres_server: str, template_database: str
) -> Iterator[str]:
    with databases.temporary_database(postgres_server, template_database) as url:
        yield pgbouncer.through(url, services.pgbouncer)


@pytest.fixture
def emptied_database_url(postgres_server: str, module_database: str) -> Iterator[str]:
    """As ``database_url``, but one for a whole module, emptied for each test: for cheap tests.

    Tests that change tables, or that leave processes behind, need one of their own.
    """
    tables = Tables(module_database)
    wait_until(lambda: tables.cut_connections() == 0, 10, "nobody is connected")
    for table in ("task", "slot", "barrier", "worker", "group", "queue", "poison", "effect",
                  "dispatch"):  # fmt: skip
        tables.ask(f"DELETE FROM pgbarrier_{table}")
    tables.ask("UPDATE pgbarrier_reaper SET pass_at = 'epoch'")
    yield module_database
    assert databases.leaks(postgres_server, module_database) == []


@pytest.fixture
def app(
    make_app: Callable[..., Celery],
    redis_broker: Broker,
    database_url: str,
    request: pytest.FixtureRequest,
) -> Celery:
    """An app on the test's database and broker; ``@pytest.mark.settings(key=value)`` adds to it."""
    marker = request.node.get_closest_marker("settings")
    return make_app(
        redis_broker, databases.backend_url(database_url), **(marker.kwargs if marker else {})
    )


@pytest.fixture
def backend(app: Celery) -> BarrierBackend:
    found = app.backend
    assert isinstance(found, BarrierBackend)
    return found


@pytest.fixture
def tables(database_url: str) -> Tables:
    return Tables(database_url)


@pytest.fixture
def charges(tables: Tables) -> Callable[[], list[str]]:
    """The names in the table that blocks of ``self.transaction()`` write to."""
    tables.ask(TABLE)
    tables.ask("TRUNCATE charge")
    return lambda: [row.name for row in tables.ask("SELECT name FROM charge ORDER BY id")]


@pytest.fixture
def wired(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire
) -> Iterator[InlineWorker]:
    """A worker whose line to PostgreSQL can be cut."""
    app = make_app(redis_broker, databases.backend_url(wire.url))
    with workers(app, redis_broker) as make:
        worker = make()
        tasks.add.delay(0, 0)
        worker.drain()
        yield worker


@pytest.fixture
def make_worker(app: Celery, redis_broker: Broker) -> Iterator[Callable[..., InlineWorker]]:
    """``make_worker(name)``: one more worker inside this process."""
    with workers(app, redis_broker) as make:
        yield make


@pytest.fixture
def worker(make_worker: Callable[..., InlineWorker]) -> InlineWorker:
    return make_worker()


@pytest.fixture
def wire(database_url: str) -> Iterator[Wire]:
    """A line to the test's database that can be listened to and cut."""
    with Wire(database_url) as line:
        yield line


@pytest.fixture
def hook() -> Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """``@hook("name")``: what the task ``hooked.s(value, "name")`` runs."""

    def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
            tasks.hooks[name] = function
            return function

        return decorator

    return register


@pytest.fixture(params=["psycopg2", "psycopg"])
def each_driver(
    request: pytest.FixtureRequest,
    make_app: Callable[..., Celery],
    redis_broker: Broker,
    database_url: str,
) -> Celery:
    """The app through each of the two drivers."""
    url = databases.with_driver(database_url, request.param)
    return make_app(redis_broker, databases.backend_url(url))


@pytest.fixture(params=list(KINDS))
def world(
    request: pytest.FixtureRequest,
    make_app: Callable[..., Celery],
    redis_broker: Broker,
    emptied_database_url: str,
    tmp_path: Path,
) -> Iterator[World]:
    """The test is run with claimed tasks, with plain ones, and on Celery's Redis backend.

    ``@pytest.mark.settings(key=value)`` adds to the app.
    """
    marker = request.node.get_closest_marker("settings")
    settings = marker.kwargs if marker else {}
    path = tmp_path / "notes"
    with open_world(
        request.param, make_app, redis_broker, emptied_database_url, path, **settings
    ) as made:
        yield made
