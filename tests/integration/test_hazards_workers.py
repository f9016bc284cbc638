"""Hazards 1, 5, 6, 9, 14 and 15 where the behaviour of real workers matters."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task, chain, chord
from celery.exceptions import ChordError

import celery_pgbarrier
from celery_pgbarrier import faults
from celery_pgbarrier.embedded import EmbeddedBroker
from celery_pgbarrier.errors import TaskCrashed
from tests.support import databases
from tests.support.app import FAST_RECOVERY
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import (
    add,
    crash,
    crash_once,
    identity,
    kill_once,
    noted,
    noted_error,
    notes,
    plain,
    replaced,
    sleepy,
    xsum,
)
from tests.support.waiting import wait_until
from tests.support.workers import BeatProcess, WorkerProcess

StartWorker = Callable[..., WorkerProcess]
fast = pytest.mark.settings(**FAST_RECOVERY)


@pytest.fixture
def start(
    app: Celery, redis_broker: Broker, database_url: str, start_worker: StartWorker
) -> StartWorker:
    """``start(**options)``: a worker on the test's database and broker, which mends fast."""

    def start(settings: dict[str, Any] | None = None, **options: Any) -> WorkerProcess:
        return start_worker(
            redis_broker,
            databases.backend_url(database_url),
            settings={**FAST_RECOVERY, **(settings or {})},
            **options,
        )

    return start


def passes(tables: Tables, count: int) -> None:
    """Wait until the reaper has begun so many passes from now on."""
    for _ in range(count):
        before = tables.value("SELECT pass_at FROM pgbarrier_reaper")
        wait_until(
            lambda before=before: tables.value("SELECT pass_at FROM pgbarrier_reaper") != before
        )


@pytest.mark.slow
@fast
def test_hazard_01_a_wiped_message_of_a_second_step_is_sent_again(
    start: StartWorker, redis_broker: Broker, tables: Tables, tmp_path: Path
) -> None:
    """The second step waits in a queue of its own, which the broker forgets."""
    path, queue = str(tmp_path / "runs"), f"{redis_broker.queue}-second"
    second = noted.s(path).set(queue=queue)
    result = chord([add.s(1, 1) | second, add.s(5, 5)], xsum.s()).delay()
    start(concurrency=1)
    wait_until(lambda: redis_broker.depth(queue) == 1, message="the second step waits")
    assert redis_broker.purge(queue) == 1
    start(concurrency=1, queues=[queue])
    assert result.get(timeout=60) == 12
    assert notes(path) == ["2"]


@pytest.mark.slow
@fast
@pytest.mark.parametrize("kind", ["chain", "replace", "body"])
def test_hazard_01_and_13_a_process_that_dies_before_it_publishes(
    start: StartWorker, tables: Tables, tmp_path: Path, kind: str
) -> None:
    """The outcome is committed and its child is killed: what follows comes from the tables."""
    path, fired = str(tmp_path / "runs"), tmp_path / "fired"
    canvas = {
        "chain": lambda: chord([add.s(1, 1) | noted.s(path)], xsum.s()),
        "replace": lambda: chord([replaced.s(noted.si(2, path) | identity.s())], xsum.s()),
        "body": lambda: chord([add.s(1, 1)], xsum.s() | noted.s(path)),
    }[kind]()
    point = "release.committed" if kind == "body" else "finish.committed"
    start(concurrency=1, env={faults.VARIABLE: f"{point}=kill@{fired}"})
    result = canvas.delay()
    assert result.get(timeout=60) == 2
    assert fired.exists()
    assert notes(path) == ["2"]


@pytest.mark.slow
@fast
def test_hazard_05_a_plain_member_is_not_sent_again_while_it_runs(
    start: StartWorker, tables: Tables, tmp_path: Path
) -> None:
    started, gate = tmp_path / "started", tmp_path / "gate"
    start(concurrency=2, settings={"pgbarrier_republish_after": 0.2})
    result = chord([plain.sleepy.s(1, str(gate), str(started))], xsum.s()).delay()
    wait_until(lambda: notes(started), message="the member runs")
    sent = "SELECT publications FROM pgbarrier_task WHERE barrier_id IS NOT NULL"
    before = tables.value(sent)
    passes(tables, 4)
    assert tables.value(sent) == before
    gate.touch()
    assert result.get(timeout=60) == 1
    assert notes(started) == ["1"]


@pytest.mark.slow
def test_hazard_06_a_broker_outage_longer_than_the_lease_frees_nothing(
    own_redis: EmbeddedBroker, own_broker: Broker, database_url: str,
    make_app: Callable[..., Celery], start_worker: StartWorker, tables: Tables, tmp_path: Path,
) -> None:  # fmt: skip
    """The heartbeat does not hang on the loop that waits for the broker."""
    settings = {**FAST_RECOVERY, "pgbarrier_lease": 1.5, "pgbarrier_heartbeat": 0.3}
    url = databases.backend_url(database_url)
    make_app(own_broker, url, **settings)
    started, gate = tmp_path / "started", tmp_path / "gate"
    start_worker(own_broker, url, concurrency=1, settings=settings)
    result = chord([sleepy.s(1, str(gate), str(started))], xsum.s()).delay()
    wait_until(lambda: notes(started), message="the member runs")
    own_redis.stop()
    over = time.monotonic() + 2 * 1.5
    wait_until(lambda: time.monotonic() > over, message="two leases have passed")
    passes(tables, 2)
    own_redis.start()
    gate.touch()
    assert result.get(timeout=60) == 1
    assert notes(started) == ["1"]
    assert tables.value("SELECT count(*) FROM pgbarrier_worker WHERE state = 'dead'") == 0


@pytest.mark.slow
@fast
@pytest.mark.parametrize(
    "settings",
    [{}, {"task_acks_late": True, "task_reject_on_worker_lost": True}],
    ids=["defaults", "acks_late"],
)
def test_hazard_09_a_lost_process_is_no_failure_while_crashes_are_left(
    start: StartWorker, tables: Tables, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Members that end their process run again; their chord never hears of it."""
    errors = str(tmp_path / "errors")
    start(concurrency=2, settings=settings)
    failed = noted_error.s(errors)
    header = [
        crash_once.s(1, str(tmp_path / "once")).set(link_error=failed),
        kill_once.s(2, str(tmp_path / "kill")).set(link_error=failed),
        chain(crash_once.s(3, str(tmp_path / "head")), add.s(10)),
        add.s(4, 4),
    ]
    result = chord(header, xsum.s().set(link_error=[failed])).delay()
    assert result.get(timeout=60) == 1 + 2 + 13 + 8
    assert notes(errors) == []
    assert tables.value("SELECT sum(crashes) FROM pgbarrier_task") >= 3
    assert tables.count("task", "status NOT IN ('SUCCESS')") == 0


@pytest.mark.slow
@fast
def test_hazard_09_when_crashes_are_spent_the_task_fails_once(
    start: StartWorker, tables: Tables, tmp_path: Path
) -> None:
    paths = [str(tmp_path / name) for name in ("member", "body")]
    start(concurrency=1, settings={"pgbarrier_max_crashes": 2})
    member = crash.s().set(link_error=noted_error.s(paths[0]))
    body = xsum.s().set(link_error=[noted_error.s(paths[1])])
    result = chord([member, add.s(1, 1)], body).delay()
    with pytest.raises((ChordError, TaskCrashed), match="died with its process 2 times"):
        result.get(timeout=60)
    assert isinstance(result.parent.results[0].result, TaskCrashed)
    passes(tables, 2)
    wait_until(lambda: notes(paths[0]) and notes(paths[1]), message="the errbacks have run")
    assert notes(paths[0]) == [result.parent.results[0].id]
    assert notes(paths[1]) == [result.id]


@pytest.mark.slow
@fast
def test_hazard_09_a_plain_task_whose_process_dies_fails_as_in_celery(
    start: StartWorker, tables: Tables, tmp_path: Path
) -> None:
    path = str(tmp_path / "body")
    start(concurrency=1)
    body = xsum.s().set(link_error=[noted_error.s(path)])
    result = chord([plain.crash.s(), add.s(1, 1)], body).delay()
    with pytest.raises(Exception, match=r"Worker|died"):
        result.get(timeout=60)
    wait_until(lambda: notes(path) == [result.id], message="the errback has run once")


@pytest.mark.slow
@fast
def test_hazard_14_the_reaper_works_while_every_slot_is_busy(
    start: StartWorker, redis_broker: Broker, tables: Tables, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A producer dies before it publishes; the one slot of the one worker is taken."""
    started, gate = tmp_path / "started", tmp_path / "gate"
    start(concurrency=1, arguments=["--prefetch-multiplier=1"])
    busy = sleepy.delay(0, str(gate), str(started))
    wait_until(lambda: notes(started), message="the slot is taken")
    monkeypatch.setattr(faults, "_armed", {"dispatch.committed": (faults._raise, None)})
    with pytest.raises(faults.InjectedFault):
        chord([add.s(1, 1), add.s(2, 2)], xsum.s()).delay()
    monkeypatch.undo()
    published = "SELECT count(*) FROM pgbarrier_task WHERE publications = 1"
    wait_until(lambda: tables.value(published) == 2, 30, "the members are published")
    assert tables.task(busy.id).state == "running"
    gate.touch()
    wait_until(lambda: tables.barrier_states() == ["released"], 30)


@fast
def test_hazard_14_the_beat_entry_expires_and_is_never_a_barrier_task(
    app: Celery, redis_broker: Broker, database_url: str, worker: InlineWorker, tables: Tables,
    tmp_path: Path,
) -> None:  # fmt: skip
    entry = celery_pgbarrier.beat_schedule(schedule=0.5)
    (options,) = [item["options"] for item in entry.values()]
    assert options == {"expires": 0.5}
    assert app.backend is not None
    task = app.tasks["celery_pgbarrier.reap"]
    assert issubclass(app.Task, celery_pgbarrier.BarrierTask)
    assert isinstance(task, Task)
    assert not isinstance(task, celery_pgbarrier.BarrierTask)
    assert (task.ignore_result, task.acks_late) == (True, False)

    url = databases.backend_url(database_url)
    log = tmp_path / "beat.log"
    with BeatProcess(redis_broker, url, log, settings={"beat_schedule": entry}):
        wait_until(lambda: redis_broker.depth() >= 2, message=log.read_text)
    first = worker.take()
    assert first.name == "celery_pgbarrier.reap"
    assert first.expires is not None
    worker.run(first)
    worker.drain()
    assert tables.count("task") == 0


def test_hazard_14_beat_schedule_takes_a_queue_and_other_overrides() -> None:
    (entry,) = celery_pgbarrier.beat_schedule(queue="ops", options={"priority": 9}).values()
    assert entry["schedule"] == 15.0
    assert entry["options"] == {"expires": 15.0, "queue": "ops", "priority": 9}
    (entry,) = celery_pgbarrier.beat_schedule(kwargs={}, options={"expires": 5}).values()
    assert entry["options"]["expires"] == 5
    assert entry["kwargs"] == {}


@pytest.mark.slow
@fast
def test_hazard_15_a_head_that_is_revoked_by_remote_control_fails_its_chord(
    start: StartWorker, app: Celery, tables: Tables, tmp_path: Path
) -> None:
    """One that waits behind a busy slot, and one that is terminated while it runs."""
    started, gate, errors = tmp_path / "started", tmp_path / "gate", str(tmp_path / "errors")
    start(concurrency=1)
    body = xsum.s().set(link_error=[noted_error.s(errors)])
    running = chain(sleepy.s(0, str(gate), str(started)).set(task_id="running"), add.s(1))
    waiting = chain(add.s(1, 1).set(task_id="waiting"), add.s(1))
    result = chord([running, waiting, add.s(5, 5)], body).delay()
    wait_until(lambda: notes(started), message="the slot is taken")
    app.control.revoke("waiting")
    app.control.revoke("running", terminate=True, signal="SIGKILL")
    with pytest.raises(Exception, match=r"revoked|terminated|TaskRevoked"):
        result.get(timeout=60)
    wait_until(lambda: notes(errors) == [result.id], message="the errback has run once")
    assert notes(started) == ["0"]
    assert tables.task("running").status == "REVOKED"
    assert tables.task("waiting").status == "REVOKED"
