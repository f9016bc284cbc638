"""Hazards 2, 4 and 5: who holds a task, and when it passes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord
from celery.exceptions import Ignore, Reject

from celery_pgbarrier import lease, reaper
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.errors import HolderLost, MemberEndedWithoutResult
from celery_pgbarrier.store import sql
from celery_pgbarrier.worker import audit
from tests.support.holding import bury, claim, member_of_a_chord
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import (
    add,
    hooked,
    hooked_late,
    identity,
    noted_error,
    notes,
    plain,
    retry_until,
    xsum,
)

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]
MakeWorker = Callable[..., InlineWorker]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


# -- 2


def test_hazard_02_a_claim_that_is_held_but_not_run_is_released_by_the_second_audit(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    result, message = member_of_a_chord(worker, add.s(2, 2))
    claim(backend, worker, message)
    with worker.identity():
        lease.beat(backend)
        idle = audit(backend, {})
        assert tables.task(message.id).state == "running"
        assert audit(backend, idle) == {}
    row = tables.task(message.id)
    assert (row.state, row.token, row.crashes) == ("queued", None, 0)
    worker.drain()
    assert result.get(timeout=5) == [4, 2]


def test_hazard_02_the_audit_leaves_alone_what_runs_or_has_just_begun(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, hook: Hook
) -> None:
    looks: list[dict[str, int]] = []

    @hook("look")
    def look(task: Any, value: Any) -> None:
        idle: dict[str, int] = {}
        for _ in range(3):
            idle = audit(backend, idle)
            looks.append(idle)
        assert tables.task(task.request.id).state == "running"

    result = hooked.delay(1, "look")
    worker.drain()
    assert looks == [{}, {}, {}]
    assert result.get(timeout=5) == 1
    assert tables.task(result.id).attempt == 1


def test_hazard_02_the_audit_leaves_other_workers_alone(
    backend: BarrierBackend, make_worker: MakeWorker, tables: Tables
) -> None:
    one, other = make_worker("one"), make_worker("other")
    result = add.delay(1, 1)
    message = one.take()
    claim(backend, one, message)
    with other.identity():
        lease.beat(backend)
        assert audit(backend, audit(backend, audit(backend, {}))) == {}
    assert tables.task(result.id).state == "running"


def test_hazard_02_a_claim_whose_answer_was_lost_is_granted_to_the_same_child_again(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    _, message = member_of_a_chord(worker, add.s(2, 2))
    lost = claim(backend, worker, message)
    again = claim(backend, worker, message)
    assert again.token != lost.token
    assert str(tables.task(message.id).token) == again.token


@pytest.mark.parametrize("kind", [hooked, plain.hooked], ids=["claimed", "plain"])
def test_hazard_02_a_member_that_ends_in_ignore_fails_its_chord_and_says_so(
    app: Celery, worker: InlineWorker, tables: Tables, hook: Hook, tmp_path: Path, kind: Any
) -> None:
    @hook("ignore")
    def ignore(task: Any, value: Any) -> None:
        raise Ignore

    path = tmp_path / "errors"
    body = xsum.s().set(link_error=[noted_error.s(str(path))])
    result = chord([kind.s(1, "ignore"), add.s(1, 1)], body).delay()
    worker.drain()
    assert result.state == "FAILURE"
    assert "ended with Ignore and no result" in str(result.result)
    assert isinstance(result.parent.results[0].result, MemberEndedWithoutResult)
    assert notes(path) == [result.id]


def test_hazard_02_an_ordinary_task_that_ends_in_ignore_is_done_and_not_run_again(
    worker: InlineWorker, backend: BarrierBackend, tables: Tables, hook: Hook
) -> None:
    runs: list[int] = []

    @hook("ignore")
    def ignore(task: Any, value: Any) -> None:
        runs.append(value)
        raise Ignore

    result = hooked.delay(1, "ignore")
    worker.drain()
    assert (tables.task(result.id).state, result.state) == ("done", "PENDING")
    tables.overdue()
    reaper.run_once(backend)
    worker.drain()
    assert runs == [1]


@pytest.mark.parametrize("late", [False, True])
def test_hazard_02_reject_with_requeue_goes_back_to_queued(
    worker: InlineWorker, backend: BarrierBackend, tables: Tables, hook: Hook, late: bool
) -> None:
    runs: list[int] = []

    @hook("reject once")
    def reject_once(task: Any, value: Any) -> None:
        runs.append(value)
        if len(runs) == 1:
            raise Reject("not now", requeue=True)

    task = hooked_late if late else hooked
    result = chord([task.s(1, "reject once"), add.s(1, 1)], identity.s()).delay()
    member = result.parent.results[0].id
    for message in worker.take_all():
        worker.run(message)
    row = tables.task(member)
    assert (row.state, row.token, row.crashes) == ("queued", None, 0)
    tables.overdue()  # an early acknowledged message does not come back by itself
    reaper.run_once(backend)
    worker.drain()
    assert result.get(timeout=5) == [1, 2]
    assert runs == [1, 1]


@pytest.mark.parametrize("kind", [hooked, plain.hooked], ids=["claimed", "plain"])
def test_hazard_02_reject_without_requeue_is_the_failure_of_the_task(
    worker: InlineWorker, tables: Tables, hook: Hook, kind: Any
) -> None:
    @hook("reject")
    def reject(task: Any, value: Any) -> None:
        raise Reject("never", requeue=False)

    result = chord([kind.s(1, "reject"), add.s(1, 1)], identity.s()).delay()
    worker.drain()
    assert result.parent.results[0].state == "FAILURE"
    assert result.state == "FAILURE"
    assert tables.barrier_states() == ["failed"]


# -- 4


@pytest.mark.settings(pgbarrier_max_crashes=2)
@pytest.mark.parametrize("member", [False, True])
def test_hazard_04_retries_do_not_eat_the_crash_limit(
    app: Celery, worker: InlineWorker, tables: Tables, member: bool
) -> None:
    task = retry_until.s(7, 6)
    result = chord([task], xsum.s()).delay() if member else task.delay()
    assert worker.drain() == 7 + member
    assert result.get(timeout=5) == 7
    row = tables.task(result.parent.results[0].id if member else result.id)
    assert (row.attempt, row.crashes, row.seq) == (7, 0, 6)


@pytest.mark.settings(pgbarrier_max_crashes=2)
def test_hazard_04_rolling_deploys_do_not_eat_the_crash_limit(
    backend: BarrierBackend, make_worker: MakeWorker, tables: Tables
) -> None:
    """Five workers in a row are told to stop, and killed before the task has ended."""
    result = chord([add.s(1, 1)], xsum.s()).delay()
    for number in range(5):
        worker = make_worker(f"deploy {number}")
        message = worker.take()
        assert message is not None
        claim(backend, worker, message)
        with worker.identity():
            lease.beat(backend, "stopping")
        tables.silence(worker.boot.id)
        reaper.run_once(backend)
        tables.silence(worker.boot.id)
        reaper.run_once(backend)
    last = make_worker("last")
    last.drain()
    assert result.get(timeout=5) == 2
    row = tables.task(result.parent.results[0].id)
    assert (row.attempt, row.crashes) == (6, 0)


def test_hazard_04_a_clean_end_of_a_worker_gives_its_claims_back_at_once(
    backend: BarrierBackend, worker: InlineWorker, make_worker: MakeWorker, tables: Tables
) -> None:
    result = chord([add.s(1, 1)], xsum.s()).delay()
    claim(backend, worker, worker.take())
    with worker.identity():
        lease.stopped(backend)
    assert reaper.run_once(backend).tasks_released == 1
    make_worker("next").drain()
    assert result.get(timeout=5) == 2
    assert tables.task(result.parent.results[0].id).crashes == 0


# -- 5


@pytest.mark.parametrize("registered", [True, False])
def test_hazard_05_a_plain_member_that_outlasts_republish_after_is_not_run_twice(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, hook: Hook, registered: bool
) -> None:
    """Not even where its worker has not been heard of yet: it has only just started."""
    published: list[int] = []

    @hook("slow")
    def slow(task: Any, value: Any) -> None:
        for _ in range(3):
            tables.overdue()
            published.append(reaper.run_once(backend).messages_published)

    if registered:
        with worker.identity():
            lease.beat(backend)
    result = chord([plain.hooked.s(1, "slow")], xsum.s()).delay()
    worker.drain()
    assert published == [0, 0, 0]
    assert result.get(timeout=5) == 1


def test_hazard_05_a_plain_member_whose_worker_dies_fails_as_in_celery(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, hook: Hook
) -> None:
    @hook("die")
    def die(task: Any, value: Any) -> None:
        bury(backend, worker, tables)

    result = chord([plain.hooked.s(1, "die"), add.s(1, 1)], xsum.s()).delay()
    worker.drain()
    assert isinstance(result.parent.results[0].result, HolderLost)
    assert result.state == "FAILURE"


def test_hazard_05_a_plain_member_that_acknowledges_late_is_run_again(
    backend: BarrierBackend, worker: InlineWorker, make_worker: MakeWorker, tables: Tables,
    hook: Hook,
) -> None:  # fmt: skip
    runs: list[int] = []

    @hook("die once")
    def die_once(task: Any, value: Any) -> int:
        runs.append(value)
        if len(runs) == 1:
            bury(backend, worker, tables)
            make_worker("next").drain()
            return 4
        return 5

    result = chord([plain.hooked_late.s(1, "die once")], xsum.s()).delay()
    worker.drain()
    assert runs == [1, 1]
    assert result.get(timeout=5) == 5


def test_a_claim_is_tried_again_where_its_worker_was_registered_a_moment_too_late(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process of the worker registers it between the claim and the look at its reasons."""
    result = add.delay(1, 1)
    message = worker.take()
    assert message is not None
    statement = backend.database.statement

    def meanwhile(template: str, *values: Any) -> Any:
        if template == sql.INSPECT:
            lease.beat(backend)
        return statement(template, *values)

    monkeypatch.setattr(backend.database, "statement", meanwhile)
    tables.ask("UPDATE pgbarrier_worker SET state = 'dead'")
    worker.run(message)
    assert result.get(timeout=5) == 2


def test_a_late_look_at_a_plain_task_of_a_dead_worker_leaves_its_next_run_alone(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    """Two reapers find it; the second one comes to it when another worker runs it again."""
    result, message = member_of_a_chord(worker, plain.add.s(2, 2))
    start = """
        UPDATE pgbarrier_task SET state = 'running', worker = gen_random_uuid(), pid = 1,
               rerun = :rerun, due_at = NULL WHERE id = :id RETURNING CAST(worker AS text)
    """
    for rerun in (True, False):
        tables.ask(start, id=message.id, rerun=rerun)
        rows = backend.database.statement(sql.CLAIMS_LOST, {"limit": 10})
        (seen,) = [row for row in rows if row.id == message.id]
        healthy = tables.ask(start, id=message.id, rerun=rerun)[0][0]
        reaper.settle_claim(backend, seen, True, reaper.Counts())
        row = tables.task(message.id)
        assert (row.state, str(row.worker), row.crashes) == ("running", healthy, 0)
    assert not result.ready()


def test_a_retry_is_recorded_where_a_crash_of_the_server_took_the_first_claim(
    worker: InlineWorker, tables: Tables, hook: Hook
) -> None:
    """First claims are not flushed: the row that one made may be gone when its task is retried."""
    runs: list[int] = []

    @hook("forgotten")
    def forgotten(task: Any, value: Any) -> str:
        runs.append(1)
        if len(runs) == 1:
            tables.ask("DELETE FROM pgbarrier_task WHERE id = :id RETURNING id", id=task.request.id)
            raise task.retry(countdown=0)
        return "done"

    result = hooked.delay(1, "forgotten")
    worker.drain()
    assert result.get(timeout=5) == "done"
    assert len(runs) == 2
