"""Hazards 6 and 8: leases that end too early, and fences that let two through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import chord

from celery_pgbarrier import lease, reaper
from celery_pgbarrier.backend import BarrierBackend
from tests.support.holding import bury, claim, member_of_a_chord
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import (
    add,
    hooked,
    identity,
)

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]
MakeWorker = Callable[..., InlineWorker]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


# -- 6


def test_hazard_06_the_end_of_a_database_outage_kills_no_lease(
    backend: BarrierBackend, make_worker: MakeWorker, tables: Tables
) -> None:
    """The first pass after an outage comes before any heartbeat: it only suspects."""
    worker = make_worker()
    results = [add.delay(n, n) for n in range(3)]
    for message in worker.take_all():
        claim(backend, worker, message)
    tables.silence(worker.boot.id)
    counts = reaper.run_once(backend)
    assert (counts.workers_dead, counts.tasks_released) == (0, 0)
    assert tables.value("SELECT count(*) FROM pgbarrier_worker WHERE suspect_at IS NOT NULL") == 1
    with worker.identity():
        lease.beat(backend)
    for _ in range(3):
        assert reaper.run_once(backend).workers_dead == 0
    assert {tables.task(result.id).state for result in results} == {"running"}


def test_hazard_06_a_worker_that_stays_silent_dies_at_the_second_look(
    backend: BarrierBackend, make_worker: MakeWorker, tables: Tables
) -> None:
    worker = make_worker()
    result = add.delay(1, 1)
    claim(backend, worker, worker.take())
    tables.silence(worker.boot.id)
    assert reaper.run_once(backend).workers_dead == 0
    assert reaper.run_once(backend).workers_dead == 0  # two heartbeats have not passed
    tables.silence(worker.boot.id)
    counts = reaper.run_once(backend)
    assert (counts.workers_dead, counts.tasks_released) == (1, 1)
    row = tables.task(result.id)
    assert (row.state, row.crashes) == ("queued", 1)
    make_worker("next").drain()
    assert result.get(timeout=5) == 2


def test_hazard_06_a_worker_outlives_a_look_before_its_lease_is_over(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    """The early look lets the second one come by lease + 2 heartbeats + reap interval."""
    with worker.identity():
        lease.beat(backend)
    silence = backend.settings.lease - backend.settings.reap_interval
    tables.ask(
        "UPDATE pgbarrier_worker SET beat_at = beat_at - make_interval(secs => :silence)",
        silence=silence,
    )
    assert reaper.run_once(backend).workers_dead == 0
    assert tables.value("SELECT count(*) FROM pgbarrier_worker WHERE suspect_at IS NOT NULL") == 1
    tables.ask("UPDATE pgbarrier_worker SET suspect_at = suspect_at - interval '1 day'")
    assert reaper.run_once(backend).workers_dead == 0


def test_hazard_06_a_worker_that_was_buried_alive_registers_itself_again(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    bury(backend, worker, tables)
    assert tables.value("SELECT state FROM pgbarrier_worker") == "dead"
    result = add.delay(1, 1)
    worker.drain()
    assert result.get(timeout=5) == 2
    assert tables.value("SELECT state FROM pgbarrier_worker") == "running"


# -- 8


def test_hazard_08_the_fence_differs_for_two_holders_of_the_same_attempt(
    backend: BarrierBackend, make_worker: MakeWorker, tables: Tables, hook: Hook
) -> None:
    """A grant is lost in a crash of PostgreSQL, and the next one has the same number.

    The first holder ends while the second one runs: its outcome is refused, by token.
    """
    first, second = make_worker("first"), make_worker("second")
    runs: list[str] = []

    @hook("twice")
    def twice(task: Any, value: Any) -> str:
        runs.append(lease.boot.name)
        if len(runs) == 1:
            tables.ask(
                "UPDATE pgbarrier_task SET state = 'queued', attempt = 0, token = NULL,"
                " worker = NULL WHERE id = :id",
                id=task.request.id,
            )
            assert claim(backend, second, copy).number == 1
        return lease.boot.name

    result = chord([hooked.s(0, "twice"), add.s(1, 1)], identity.s()).delay()
    message, other = first.take_all()
    copy = first.request(message.message)
    first.run(message)
    row = tables.task(message.id)
    assert (row.state, row.attempt, str(row.worker)) == ("running", 1, second.boot.id)
    second.run(copy)
    second.run(other)
    second.drain()
    assert runs == ["first", "second"]
    assert result.get(timeout=5) == ["second", 2]


@pytest.mark.parametrize("holder", ["another worker", "another process of the worker"])
def test_hazard_08_a_parent_writes_only_for_the_child_that_holds_the_claim(
    make_worker: MakeWorker, backend: BarrierBackend, tables: Tables, holder: str
) -> None:
    """A time limit of a run that has passed on stores nothing, calls nothing, counts nothing."""
    first, second = make_worker("first"), make_worker("second")
    result, message = member_of_a_chord(first, add.s(2, 2))
    here = holder == "another process of the worker"
    claim(backend, first if here else second, message)
    message.worker_pid = 4_000_000 if here else None  # no process has so high an id
    with first.identity():
        message.on_timeout(False, 1.0)
    row = tables.task(message.id)
    assert (row.state, row.status) == ("running", "PENDING")
    assert tables.barrier_states() == ["waiting"]
    assert result.state == "PENDING"


def test_hazard_08_a_parent_may_write_for_its_own_child(
    worker: InlineWorker, backend: BarrierBackend, tables: Tables
) -> None:
    result, message = member_of_a_chord(worker, add.s(2, 2))
    attempt = claim(backend, worker, message)
    assert attempt.number == 1
    message.worker_pid = lease.holder().pid
    with worker.identity():
        message.on_timeout(False, 1.0)
    assert tables.task(message.id).status == "FAILURE"
    assert result.state == "FAILURE"
