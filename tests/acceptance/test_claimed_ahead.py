"""A busy prefork worker claims waiting messages, and commits what its processes finish, in batches.

Every test has a backlog of short tasks; what was claimed ahead is told by ``pid`` 0 in its history.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from celery import chord, group
from celery.result import GroupResult

from celery_pgbarrier.embedded import EmbeddedPostgres
from celery_pgbarrier.lease import publish_recorded
from tests.acceptance.scene import TRANSACTIONS, Scene, sum_of
from tests.acceptance.tasks import part, total
from tests.support.brokers import Broker
from tests.support.tasks import add, retry_until
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

MANY = 120
AHEAD = "SELECT count(DISTINCT id) FROM task_history WHERE became = 'running' AND pid = 0"
HELD = "SELECT id, state, crashes FROM pgbarrier_task WHERE state NOT IN ('done', 'queued')"
QUEUED = "SELECT count(*) FROM pgbarrier_task WHERE state = 'queued'"
UNPUBLISHED = f"{QUEUED} AND published_at IS NULL"
RUNS = "SELECT attempt, crashes, count(*) FROM pgbarrier_task GROUP BY 1, 2 ORDER BY 1, 2"


def warm(scene: Scene, **options: Any) -> WorkerProcess:
    """A worker that has learnt how long the tasks take."""
    worker = scene.worker(**{"concurrency": 2, **options})
    group(add.s(n, n) for n in range(6))().get(timeout=30)
    chord([part.s(n) for n in range(6)])(total.s("warm")).get(timeout=30)
    return worker


def backlog(count: int = MANY) -> GroupResult:
    """Call tasks in no chord, which have no rows before they run."""
    return group(add.s(n, 1) for n in range(count))()


def steady(count: Callable[[], int]) -> Callable[[], bool]:
    """A condition that holds when a count is what it was when it was last looked at."""
    seen: list[int] = []

    def holds() -> bool:
        seen.append(count())
        return len(seen) > 1 and seen[-1] == seen[-2]

    return holds


def ahead(scene: Scene) -> int:
    """How many tasks were claimed ahead."""
    return int(scene.query(AHEAD)[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "members"])
def test_a_backlog_costs_fewer_transactions_than_tasks(scene: Scene, kind: str) -> None:
    worker = warm(scene)
    scene.query("SELECT 1")
    worker.send(signal.SIGSTOP)
    result = backlog() if kind == "alone" else scene.submit("busy", MANY)
    worker.send(signal.SIGCONT)
    expected = [n + 1 for n in range(MANY)] if kind == "alone" else sum_of(MANY)
    assert result.get(timeout=60) == expected
    wait_until(lambda: not scene.open(), 30, scene.report)
    assert ahead(scene) > MANY / 2
    assert scene.query(TRANSACTIONS)[0][0] < MANY * 0.7
    assert scene.query(RUNS) == [(1, 0, scene.finished())]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"pgbarrier_claim_ahead": 0},
        {"pgbarrier_max_crashes": 1},
        {"task_track_started": True},
        {"task_compression": "gzip"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_nothing_is_claimed_ahead_where_a_claim_tells_more(
    make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    scene = make_scene(database_url, redis_broker, **settings)
    worker = warm(scene)
    worker.send(signal.SIGSTOP)
    result = backlog(40)
    worker.send(signal.SIGCONT)
    assert result.get(timeout=60) == [n + 1 for n in range(40)]
    assert ahead(scene) == 0


@pytest.mark.slow
def test_late_acknowledgement_waits_for_the_outcome(
    make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker
) -> None:
    """Claims are made ahead, but each process commits its outcomes before the message goes."""
    scene = make_scene(database_url, redis_broker, task_acks_late=True)
    worker = warm(scene)
    worker.send(signal.SIGSTOP)
    result = backlog()
    worker.send(signal.SIGCONT)
    assert result.get(timeout=60) == [n + 1 for n in range(MANY)]
    assert ahead(scene) > MANY / 2
    assert scene.query(TRANSACTIONS)[0][0] >= MANY


@pytest.mark.slow
@pytest.mark.rabbitmq
def test_messages_of_very_short_tasks_go_with_their_claims(
    make_scene: Callable[..., Scene], database_url: str, rabbitmq_broker: Broker
) -> None:
    """More come than the prefetch count lets wait, and what was acknowledged is not lost."""
    scene = make_scene(database_url, rabbitmq_broker)
    worker = warm(scene)
    prefetched, count, done = 8, 8 * MANY, scene.finished()
    for _ in range(5):  # on a busy machine a task may seem to take long
        result = backlog(count)
        wait_until(lambda done=done: scene.finished() >= done + MANY, 60, scene.report)
        children = worker.children()
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
        wait_until(steady(scene.finished), 30, scene.report, interval=0.2)
        held = count - scene.broker.depth() - (scene.finished() - done)
        if prefetched + 1 < held < count:
            break
        for pid in children:
            os.kill(pid, signal.SIGCONT)
        result.get(timeout=60)
        done += count
        wait_until(lambda done=done: scene.finished() == done, 30, scene.report)
    assert prefetched + 1 < held < count
    worker.kill()
    scene.worker(concurrency=2)
    assert result.get(timeout=90) == [n + 1 for n in range(count)]
    wait_until(lambda: scene.finished() == done + count, 30, scene.report)


@pytest.mark.slow
def test_processes_are_killed_in_a_backlog(scene: Scene) -> None:
    """What was claimed for a process and not begun, or begun and not committed, runs again."""
    worker = warm(scene)
    chords = 6
    for number in range(chords):
        scene.submit(f"kill {number}", MANY, 0.01)  # longer than a process waits for the next
    for share in range(1, 7):
        want = share * chords * MANY // 8
        wait_until(lambda want=want: scene.finished() >= want, 60, scene.report)
        worker.kill_children()
    expected = {f"kill {number}": sum_of(MANY) for number in range(chords)}
    scene.wait_settled({"warm": sum_of(6), **expected}, 90)
    assert ahead(scene) > MANY
    killed = scene.query("SELECT sum(crashes), max(crashes) FROM pgbarrier_task")[0]
    assert 1 <= killed[0] <= 12, scene.query(RUNS)


@pytest.mark.slow
def test_a_worker_is_killed_in_a_backlog(scene: Scene) -> None:
    """Its claims pass on when its lease is over, each with a crash on its account."""
    workers = [warm(scene), scene.worker(concurrency=2)]
    scene.submit("kill", 6 * MANY, 0.002)
    for share in (1, 2):
        want = share * 2 * MANY
        wait_until(lambda want=want: scene.finished() >= want, 60, scene.report)
        workers[share - 1].kill()
        workers[share - 1].start()
    scene.wait_settled({"warm": sum_of(6), "kill": sum_of(6 * MANY)}, 90)
    for attempt, crashes, _ in scene.query(RUNS):
        assert attempt == crashes + 1


@pytest.mark.slow
def test_a_worker_that_ends_leaves_no_claim_and_repeats_nothing(scene: Scene) -> None:
    """Warm shutdown in a backlog: what waited claimed is free, and at the broker, when it ends."""
    worker = warm(scene)
    chords = 4
    for number in range(chords):
        scene.submit(f"end {number}", MANY)
    for share in range(1, 4):
        want = share * chords * MANY // 5
        wait_until(lambda want=want: scene.finished() >= want, 60, scene.report)
        assert worker.stop() == 0
        assert scene.query(HELD) == []
        assert scene.query(UNPUBLISHED) == [(0,)], "each is at the broker again"
        assert scene.broker.depth() >= scene.query(QUEUED)[0][0]
        worker.start()
        worker.wait_ready()
    expected = {f"end {number}": sum_of(MANY) for number in range(chords)}
    scene.wait_settled({"warm": sum_of(6), **expected}, 60)
    assert scene.query("SELECT max(crashes) FROM pgbarrier_task") == [(0,)]
    assert scene.query("SELECT count(*) FROM task_history WHERE became = 'done'") == [
        (scene.finished(),)
    ]
    assert ahead(scene) > MANY


@pytest.mark.slow
def test_a_lost_broker_connection_leaves_no_claim_behind(
    make_scene: Callable[..., Scene], database_url: str, own_broker: Broker
) -> None:
    """The broker brings the messages again, to the same worker: they are claimed anew."""
    scene = make_scene(database_url, own_broker)
    worker = warm(scene)
    scene.submit("cut", 4 * MANY)
    for share in (1, 2, 3):
        want = share * MANY
        wait_until(lambda want=want: scene.finished() >= want, 60, scene.report)
        with scene.broker.connection() as connection:
            _cut_all(connection)
    scene.wait_settled({"warm": sum_of(6), "cut": sum_of(4 * MANY)}, 90)
    assert worker.running
    assert scene.query("SELECT max(crashes) FROM pgbarrier_task") == [(0,)]


def _cut_all(connection: Any) -> None:
    """End all connections to Redis but this one."""
    connection.default_channel.client.client_kill_filter(_type="normal", skipme=True)


@pytest.mark.slow
def test_a_revoked_task_that_waits_claimed_is_revoked(scene: Scene) -> None:
    worker = warm(scene)
    done = scene.finished()
    worker.send(signal.SIGSTOP)
    result = backlog()
    ids = [child.id for child in result.children]
    scene.app.control.revoke(ids[MANY // 2 :])
    worker.send(signal.SIGCONT)
    assert [child.get(timeout=60) for child in result.children[:20]] == [n + 1 for n in range(20)]
    wait_until(lambda: scene.finished() == done + MANY, 60, scene.report)
    by_status = dict(
        map(tuple, scene.query("SELECT status, count(*) FROM pgbarrier_task GROUP BY 1"))
    )
    assert set(by_status) <= {"SUCCESS", "REVOKED"}
    assert by_status.get("REVOKED", 0) >= 1
    assert scene.query("SELECT count(*) FROM pgbarrier_task WHERE state <> 'done'") == [(0,)]


@pytest.mark.slow
def test_the_database_dies_in_a_backlog(
    make_scene: Callable[..., Scene], outage_database: str, own_postgres: EmbeddedPostgres,
    redis_broker: Broker,
) -> None:  # fmt: skip
    """Outcomes wait in the parent; unflushed claims are recognised; no member runs twice."""
    scene = make_scene(outage_database, redis_broker)
    warm(scene)
    scene.submit("outage", 4 * MANY)
    wait_until(lambda: scene.finished() >= MANY, 60, scene.report)
    own_postgres.kill()
    own_postgres.start()
    scene.wait_settled({"warm": sum_of(6), "outage": sum_of(4 * MANY)}, 90)
    assert scene.query("SELECT max(crashes) FROM pgbarrier_task") == [(0,)]


@pytest.mark.slow
def test_a_claim_that_has_grown_old_is_made_sure_of(scene: Scene) -> None:
    """The worker is paused beyond its lease with claims in hand; another one takes them over."""
    worker = warm(scene)
    scene.submit("pause", 2 * MANY, 0.01)
    wait_until(lambda: ahead(scene) > 20, 60, scene.report)
    pids = [worker.pid, *worker.children()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        held = "SELECT count(*) FROM pgbarrier_task WHERE state = 'running'"
        other = scene.worker(concurrency=1)
        wait_until(lambda: scene.query(held)[0][0] == 0, 60, scene.report)
        assert other.running
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    scene.wait_settled({"warm": sum_of(6), "pause": sum_of(2 * MANY)}, 90)


@pytest.mark.slow
def test_foreign_messages_and_copies_run_once(scene: Scene) -> None:
    """Messages without a stamp, each sent three times, are claimed ahead by their task id."""
    worker = warm(scene)
    worker.send(signal.SIGSTOP)
    ids = [f"foreign-{number}" for number in range(30)]
    with scene.broker.connection() as connection:
        producer = connection.Producer()
        for task_id in ids * 3:
            producer.publish(
                json.dumps([[1, 2], {}, {}]), routing_key=scene.broker.queue, exchange="",
                content_type="application/json", content_encoding="utf-8",
                headers={"lang": "py", "task": add.name, "id": task_id, "root_id": task_id},
                correlation_id=task_id,
            )  # fmt: skip
    worker.send(signal.SIGCONT)
    done = "SELECT count(*) FROM pgbarrier_task WHERE id LIKE 'foreign-%' AND state = 'done'"
    wait_until(lambda: scene.query(done)[0][0] == len(ids), 60, scene.report)
    wait_until(lambda: scene.broker.depth() == 0, 30, scene.report)
    runs = "SELECT id FROM task_history WHERE id LIKE 'foreign-%' AND became = 'running'"
    assert len(scene.query(runs)) == len(ids)
    assert ahead(scene) > 0


@pytest.mark.slow
def test_a_copy_is_a_duplicate_while_the_outcome_is_on_its_way(
    make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker
) -> None:
    """A process that has left an outcome to the parent does not take its own claim over."""
    scene = make_scene(database_url, redis_broker, pgbarrier_claim_ahead=2)
    worker = warm(scene, concurrency=1)
    worker.send(signal.SIGSTOP)
    scene.submit("copies", MANY)
    with scene.broker.connection() as connection:
        connection.default_channel.queue_purge(scene.broker.queue)
    for row in scene.query("SELECT id FROM pgbarrier_task WHERE state = 'queued'"):
        for _ in range(4):  # the copies of a message follow one another
            publish_recorded(scene.app.backend, [row.id])
    worker.send(signal.SIGCONT)
    scene.wait_settled({"warm": sum_of(6), "copies": sum_of(MANY)}, 90)
    taken = "SELECT id FROM task_history WHERE was = 'running' AND became = 'running'"
    assert scene.query(taken) == []
    assert {(attempt, crashes) for attempt, crashes, _ in scene.query(RUNS)} == {(1, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "members"])
def test_a_retry_does_not_run_under_the_claim_of_the_run_before(scene: Scene, kind: str) -> None:
    """Celery passes fields of a request that it does not know on to the message of its retry."""
    worker = warm(scene)
    group(retry_until.s(n, 0) for n in range(6))().get(timeout=30)
    worker.send(signal.SIGSTOP)
    header = [retry_until.s(n, 1) for n in range(MANY)]
    result = group(header)() if kind == "alone" else chord(header)(total.s("retries"))
    worker.send(signal.SIGCONT)
    scene.worker(concurrency=2, settings={"pgbarrier_claim_ahead": 0})
    value = result.get(timeout=60)
    assert value == ([*range(MANY)] if kind == "alone" else sum_of(MANY))
    wait_until(lambda: not scene.open(), 30, scene.report)
    assert ahead(scene) > MANY / 3
    runs = """
        SELECT seq, attempt, crashes, count(*) FROM pgbarrier_task
         WHERE name = 'test.retry_until' AND seq = 1 GROUP BY 1, 2, 3
    """
    assert scene.query(runs) == [(1, 2, 0, MANY)]
