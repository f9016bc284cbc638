"""Hazards 16, 20, 22, 24 and 26: added members, early acknowledgement, names, states, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, chord

from celery_pgbarrier import BarrierTask, lease, reaper
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.lease import Loss
from celery_pgbarrier.unit import STAMP, Stamp
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import add, hooked, identity, xsum

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]
MakeWorker = Callable[..., InlineWorker]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


def bury(backend: BarrierBackend, tables: Tables, worker: InlineWorker) -> None:
    """Let a worker fall silent, and declare it dead."""
    with worker.identity():
        lease.beat(backend)
    for _ in range(2):
        tables.silence(worker.boot.id)
        reaper.run_once(backend)


def test_hazard_16_what_an_attempt_that_died_has_added_counts_once(
    backend: BarrierBackend, make_worker: MakeWorker, tables: Tables, hook: Hook
) -> None:
    """Members are added with the adder's outcome: the first run's are not, the second's are."""
    first, second = make_worker("first"), make_worker("second")
    runs: list[int] = []

    @hook("add")
    def adds(task: Any, value: Any) -> None:
        task.add_to_chord(add.s(10, 10))
        runs.append(value)
        if len(runs) == 1:
            bury(backend, tables, first)
            second.drain()

    result = chord([hooked.s(1, "add"), add.s(2, 2)], xsum.s()).delay()
    first.drain()
    assert runs == [1, 1]
    assert result.get(timeout=5) == 1 + 4 + 20
    assert tables.count("slot", "remaining <> 0") == 0


def test_hazard_20_a_process_that_dies_before_its_claim_is_made_up_for_at_once(
    backend: BarrierBackend, redis_broker: Broker, worker: InlineWorker, tables: Tables
) -> None:
    """Its message was acknowledged early; the worker's parent knows it, and publishes it again."""
    result = chord([add.s(1, 1)], identity.s()).delay()
    lost = worker.take()
    stamp = Stamp.of(lost.id, lost._request_dict[STAMP])
    with worker.identity():
        loss = backend.process_lost(lost.id, stamp, 4711, add.name)
    assert loss is Loss.RELEASED
    assert tables.task(lost.id).crashes == 1
    assert redis_broker.depth() == 1
    worker.drain()
    assert result.get(timeout=5) == [2]


def test_hazard_22_a_worker_of_the_same_name_keeps_no_claim_of_its_predecessor(
    backend: BarrierBackend, make_worker: MakeWorker, tables: Tables, hook: Hook
) -> None:
    """A pod that starts again has its name, perhaps its process ids, but another boot."""
    before, after = make_worker("pod-0"), make_worker("pod-0")
    runs: list[int] = []

    @hook("die")
    def die(task: Any, value: Any) -> None:
        runs.append(value)
        if len(runs) == 1:
            with after.identity():
                lease.beat(backend)
            bury(backend, tables, before)
            with after.identity():
                lease.beat(backend)
            after.drain()

    result = hooked.delay(1, "die")
    before.drain()
    assert runs == [1, 1]
    assert result.get(timeout=5) == 1
    assert tables.task(result.id).crashes == 1
    states = tables.ask("SELECT state FROM pgbarrier_worker ORDER BY state")
    assert [row.state for row in states] == ["dead", "running"]


@pytest.mark.settings(task_track_started=True)
def test_hazard_24_a_duplicate_writes_no_state_over_an_outcome(
    worker: InlineWorker, tables: Tables
) -> None:
    """Celery stores STARTED before the claim; only who holds one may."""
    result = add.delay(1, 1)
    request = worker.take()
    worker.run(request)
    worker.run(worker.request(request.message))
    assert tables.task(result.id).status == "SUCCESS"
    assert result.get(timeout=5) == 2


class Careless(BarrierTask):
    """It forgets to call what it overrides."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def test_hazard_26_a_subclass_that_forgets_super_is_claimed_too(
    app: Celery, worker: InlineWorker, tables: Tables
) -> None:
    seen: list[str] = []

    @app.task(base=Careless, bind=True, name="test.careless")
    def careless(task: Any, value: Any) -> Any:
        seen.append(tables.task(task.request.id).state)
        return value

    result = careless.delay(1)
    request = worker.take()
    worker.run(request)
    worker.run(worker.request(request.message))
    assert seen == ["running"], "claimed when it began, and its duplicate was dropped"
    assert result.get(timeout=5) == 1
