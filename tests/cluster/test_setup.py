"""Canvases and failures through pytest-celery's ``celery_setup``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import chord
from celery.exceptions import ChordError
from pytest_celery import CeleryTestSetup

from tests.cluster.vendors import no_engine
from tests.support.canvases import VALUES
from tests.support.tables import Tables
from tests.support.tasks import fail, paused, xsum
from tests.support.waiting import wait_until
from tests.support.world import KINDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LONG = bool(os.environ.get("PGBARRIER_TEST_LONG"))
DEADLINE = 90.0
FEW = ["chain body", "three chords deep", "generator header", "a member that retries",
       "a member that is replaced by a chord"]  # fmt: skip


@pytest.fixture
def tables(celery_setup: CeleryTestSetup) -> Tables:
    url: str = celery_setup.backend.config()["host_url"]
    return Tables(url.removeprefix("pgbarrier+"))


def settled(tables: Tables) -> bool:
    """Whether nothing is open."""
    open_ones = tables.count("barrier", "state IN ('waiting', 'ready')")
    return not open_ones and not tables.count("task", "state <> 'done'")


def running(tables: Tables) -> list[Any]:
    """The claims that are held, with the name of their worker."""
    return tables.ask("""
        SELECT t.id, w.name FROM pgbarrier_task t JOIN pgbarrier_worker w ON w.id = t.worker
         WHERE t.state = 'running'
    """)


def restarted(setup: CeleryTestSetup) -> bool:
    """Start workers that have ended, as a supervisor would; False: to be looked at again.

    Kombu's Redis transport may end a worker whose broker refuses connections.
    """
    for worker in setup.worker_cluster:
        worker.container.reload()
        if worker.container.status == "exited":
            worker.restart()
    return False


def test_canvases(celery_setup: CeleryTestSetup, tables: Tables, tmp_path: Path) -> None:
    assert celery_setup.ready(control=True)
    maker = SimpleNamespace(t=KINDS["claimed"], path=tmp_path / "notes")
    results = {name: VALUES[name][0](maker).apply_async() for name in FEW}
    failed = chord([fail.s(), paused.s(1, 0)], xsum.s()).delay()
    for name, result in results.items():
        assert result.get(timeout=DEADLINE) == VALUES[name][1], name
    assert isinstance(failed.get(timeout=DEADLINE, propagate=False), ChordError)
    wait_until(lambda: settled(tables), DEADLINE, "nothing is open")


FAILURES: dict[str, Callable[[CeleryTestSetup], None]] = {
    "a worker is killed": lambda setup: setup.worker_cluster[0].kill(),
    "a worker is shut down": lambda setup: setup.worker_cluster[0].kill("SIGTERM"),
    "the database is killed": lambda setup: (
        setup.backend.kill(reload_container=False),
        setup.backend.restart(),
    ),
    "the broker is killed and forgets": lambda setup: (
        setup.broker.kill(reload_container=False),
        setup.broker.restart(),
    ),
}


#: Every day; the others are for containers and the long run, and stand in tests/acceptance too.
DAILY = ["a worker is killed", "the broker is killed and forgets"]


@pytest.mark.parametrize("name", FAILURES if LONG or not no_engine() else DAILY)
def test_a_chord_survives(celery_setup: CeleryTestSetup, tables: Tables, name: str) -> None:
    assert celery_setup.ready(control=True)
    result = chord([paused.s(n, 0.5) for n in range(12)], xsum.s()).delay()
    wait_until(lambda: len(running(tables)) >= 3, DEADLINE, "both workers are busy")
    FAILURES[name](celery_setup)
    supervise = name == "the broker is killed and forgets"
    wait_until(lambda: result.ready() or (supervise and restarted(celery_setup)), DEADLINE, name)
    assert result.get(timeout=1) == sum(range(12))
    wait_until(lambda: settled(tables), DEADLINE, "nothing is open")
    assert tables.barrier_states() == ["released"]
    if name == "a worker is killed":
        assert tables.value("SELECT sum(crashes) FROM pgbarrier_task") >= 1
