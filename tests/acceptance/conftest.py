"""A scene for each test, and chance that can be repeated."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_pgbarrier.embedded import EmbeddedPostgres
from celery_pgbarrier.store import schema
from tests.acceptance.scene import Scene, audited
from tests.support.app import FAST_RECOVERY
from tests.support.brokers import Broker
from tests.support.databases import backend_url
from tests.support.workers import BeatProcess, WorkerProcess

IMPORTS = {"imports": ["tests.acceptance.tasks"]}


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers, the same each time; ``PGBARRIER_TEST_SEED`` gives others."""
    seed = os.environ.get("PGBARRIER_TEST_SEED", "1")
    request.node.add_report_section("setup", "seed", f"PGBARRIER_TEST_SEED={seed}")
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture
def start_beat(tmp_path: Path) -> Iterator[Callable[..., BeatProcess]]:
    """``start_beat(broker, backend, **options)``: a ``BeatProcess``, killed at the end."""
    started: list[BeatProcess] = []
    numbers = itertools.count(1)

    def start(broker: Broker, backend: str, **options: Any) -> BeatProcess:
        beat = BeatProcess(broker, backend, tmp_path / f"beat-{next(numbers)}.log", **options)
        started.append(beat)
        beat.start()
        beat.wait_ready()
        return beat

    yield start
    for beat in started:
        beat.kill()


@pytest.fixture
def make_scene(
    make_app: Callable[..., Celery],
    start_worker: Callable[..., WorkerProcess],
    start_beat: Callable[..., BeatProcess],
) -> Iterator[Callable[..., Scene]]:
    """``make_scene(url, broker, **settings)``: a scene in the database at ``url``."""
    with ExitStack() as stack:

        def make(url: str, broker: Broker, **settings: Any) -> Scene:
            engine = stack.enter_context(audited(url))
            settings = {**FAST_RECOVERY, **IMPORTS, **settings}
            app = make_app(broker, backend_url(url), **settings)
            return Scene(url, broker, app, settings, engine, start_worker, start_beat)

        yield make


@pytest.fixture
def scene(make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker) -> Scene:
    """A scene with the settings of fast recovery, on Redis."""
    return make_scene(database_url, redis_broker)


@pytest.fixture
def outage_database(own_postgres: EmbeddedPostgres) -> str:
    """The URL of a migrated database on ``own_postgres``."""
    url = own_postgres.url()
    schema.migrate(url)
    return url
