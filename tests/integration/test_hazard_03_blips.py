"""Hazard 3: trouble with the database is never a task's outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord
from sqlalchemy import event, make_url

from celery_pgbarrier import reaper
from celery_pgbarrier.embedded import EmbeddedPostgres
from celery_pgbarrier.store import schema
from celery_pgbarrier.store.database import Database
from tests.support.app import FAST_RECOVERY
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import (
    add,
    hooked,
    identity,
    noted,
    noted_error,
    notes,
    replaced,
    retry_until,
    sleepy,
    xsum,
)
from tests.support.waiting import wait_until
from tests.support.wire import Wire
from tests.support.workers import WorkerProcess

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


#: What is said on the line when: the answer to it is lost.
MOMENTS = {
    "the claim of a member": "pgbarrier_claim_queued",
    "the outcome of a member": "pgbarrier_finish_member",
    "a transaction": "COMMIT",
    "the release": "pgbarrier_lock_barrier",
    "the record of what follows": "pgbarrier_record_tasks",
    "the mark of publication": "pgbarrier_mark_published",
}

CANVASES: dict[str, tuple[Callable[[str], Any], Any]] = {
    "member": (lambda path: noted.s(1, path), 1),
    "chain": (lambda path: noted.s(1, path) | add.s(1), 2),
    "link": (lambda path: add.s(0, 1).set(link=noted.s(path)), 1),
    "retry": (lambda path: retry_until.s(1, 2) | noted.s(path), 1),
    "replace": (lambda path: replaced.s(noted.si(1, path) | add.s(1)), 2),
}


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_hazard_03_an_answer_that_is_lost_fails_nothing_and_repeats_nothing(
    wired: InlineWorker, wire: Wire, tables: Tables, tmp_path: Path, moment: str, canvas: str
) -> None:
    """The statement took effect, and the client cannot know."""
    make, expected = CANVASES[canvas]
    path, errors = str(tmp_path / "runs"), str(tmp_path / "errors")
    body = identity.s().set(link_error=[noted_error.s(errors)])
    result = chord([make(path), add.s(5, 5)], body).delay()
    wire.cut(MOMENTS[moment])
    wired.drain()
    if result.state == "PENDING":  # who did not hear that it was the last one leaves the release
        tables.overdue()
        reaper.run_once(wired.app.backend)
        wired.drain()
    assert wire.was_cut
    assert result.get(timeout=5) == [expected, 10]
    assert (notes(path), notes(errors)) == (["1"], [])
    assert tables.count("task", "state <> 'done'") == 0
    assert tables.barrier_states() == ["released"]


@pytest.mark.parametrize("when", ["before the claim", "in the body", "before the release"])
def test_hazard_03_connections_that_are_cut_fail_nothing(
    app: Celery, worker: InlineWorker, tables: Tables, hook: Hook, when: str
) -> None:
    @hook("cut")
    def cut(task: Any, value: Any) -> None:
        if when == "in the body":
            assert tables.cut_connections()

    result = chord([hooked.s(1, "cut"), add.s(2, 2)], xsum.s()).delay()
    for number, message in enumerate(worker.take_all()):
        if (when, number) in (("before the claim", 0), ("before the release", 1)):
            assert tables.cut_connections()
        worker.run(message)
    worker.drain()
    assert result.get(timeout=5) == 5


def test_hazard_03_waiting_for_a_result_survives_a_cut(
    app: Celery, worker: InlineWorker, tables: Tables
) -> None:
    result = add.delay(1, 1)
    backend = app.backend
    with pytest.raises(Exception, match="timed out"):
        result.get(timeout=0.01)
    polls: list[int] = []

    def on_interval() -> None:
        polls.append(tables.cut_connections())
        if len(polls) == 3:
            worker.drain()

    assert dict(backend.get_many([result.id], timeout=20, on_interval=on_interval))
    assert len(polls) >= 3


@pytest.mark.slow
def test_hazard_03_a_database_that_is_away_at_the_claim_and_at_the_outcome(
    own_postgres: EmbeddedPostgres,
    redis_broker: Broker,
    make_app: Callable[..., Celery],
    start_worker: Callable[..., WorkerProcess],
    tmp_path: Path,
) -> None:
    """Real workers: it goes away in mid-task and comes back; nothing fails, nothing runs twice."""
    own_postgres.create_database("tests", "template0")
    url = own_postgres.backend_url("tests")
    settings = {**FAST_RECOVERY, "pgbarrier_lease": 30.0, "pgbarrier_heartbeat": 0.5}
    app = make_app(redis_broker, url, **settings)
    paths = [str(tmp_path / name) for name in ("started", "gate", "linked", "errors")]
    started, gate, linked, errors = paths
    worker = start_worker(redis_broker, url, concurrency=1, settings=settings)
    link = {"link": noted.s(linked), "link_error": noted_error.s(errors)}
    first = sleepy.s(1, gate, started).set(**link)
    result = chord([first, noted.s(2, started)], xsum.s()).delay()
    wait_until(lambda: notes(started) == ["1"], message="the first member runs")

    own_postgres.stop()
    Path(gate).touch()
    worker.wait_log("PostgreSQL is away, trying again")
    own_postgres.start()

    assert result.get(timeout=60) == 3
    assert (notes(started), notes(errors)) == (["1", "2"], [])
    wait_until(lambda: notes(linked) == ["1"], message="the link has run once")

    # At the claim: the message is there before the database is.
    probe = add.signature((20, 22), app=app)
    own_postgres.stop()
    sent = threading.Thread(target=probe.delay)
    sent.start()
    sent.join(30)
    worker.wait_log("Task test.add")
    own_postgres.start()
    found = "SELECT count(*) FROM pgbarrier_task WHERE name = 'test.add' AND status = 'SUCCESS'"
    tables = Tables(own_postgres.url("tests"))
    wait_until(lambda: tables.value(found) == 1, 30, worker.tail)
    failed = "SELECT count(*) FROM pgbarrier_task WHERE status = 'FAILURE'"
    assert tables.value(failed) == 0


@pytest.mark.slow
def test_hazard_03_the_first_statement_of_a_process_waits_for_a_database_that_is_away(
    own_postgres: EmbeddedPostgres,
) -> None:
    """It looks at the version of the tables before, no less patiently."""
    schema.migrate(own_postgres.url())
    own_postgres.stop()
    database = Database(make_url(own_postgres.url()))
    tried: list[bool] = []

    def check(*_: object) -> None:
        tried.append(True)

    event.listen(database.engine(), "do_connect", check)
    rows: list[object] = []
    work = threading.Thread(
        target=lambda: rows.extend(database.statement("SELECT 1 AS one", {}, 30.0))
    )
    work.start()
    wait_until(lambda: len(tried) > 1)
    own_postgres.start()
    work.join(30)
    database.dispose()
    assert rows == [(1,)]


def test_hazard_02_an_outcome_that_is_given_up_is_settled_by_the_audit(
    own_postgres: EmbeddedPostgres,
    redis_broker: Broker,
    make_app: Callable[..., Celery],
    start_worker: Callable[..., WorkerProcess],
    tmp_path: Path,
) -> None:
    """The child is idle and its parent beats: nobody else would ever release the claim."""
    own_postgres.create_database("tests", "template0")
    url = own_postgres.backend_url("tests")
    settings = {**FAST_RECOVERY, "pgbarrier_lease": 60.0, "pgbarrier_outcome_timeout": 0.2}
    make_app(redis_broker, url, **settings)
    started, gate = tmp_path / "started", tmp_path / "gate"
    worker = start_worker(redis_broker, url, concurrency=1, settings=settings)
    result = chord([sleepy.s(1, str(gate), str(started))], xsum.s()).delay()
    wait_until(lambda: notes(started), message="the member runs")
    own_postgres.stop()
    gate.touch()
    worker.wait_log("is given up")
    own_postgres.start()
    assert result.get(timeout=60) == 1
    assert notes(started) == ["1", "1"]
    tables = Tables(own_postgres.url("tests"))
    assert tables.value("SELECT max(crashes) FROM pgbarrier_task") == 0
