"""A backlog of chains: outcomes are committed in batches, with the steps that follow."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
from celery import chord, group

from tests.acceptance.scene import TRANSACTIONS, Scene, sum_of
from tests.acceptance.tasks import heard, part, total
from tests.chaos.proxy import Proxy
from tests.support.brokers import Broker
from tests.support.tasks import add, notes
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

MANY, STEPS = 60, 3
RUNS = "SELECT count(*), max(attempt), max(crashes) FROM pgbarrier_task"


@pytest.fixture
def scene(make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker) -> Scene:
    return make_scene(database_url, redis_broker)


def steps(value: int, seconds: float = 0.0) -> Any:
    """A chain that adds one with each step."""
    return part.s(value, seconds) | add.s(1) | add.s(1)


def warm(scene: Scene, **options: Any) -> WorkerProcess:
    """A worker that has learnt how long the tasks take."""
    worker = scene.worker(**{"concurrency": 2, **options})
    group(steps(n) for n in range(6))().get(timeout=30)
    chord([part.s(n) for n in range(6)])(total.s("warm")).get(timeout=30)
    return worker


def submit(scene: Scene, label: str, seconds: float = 0.0) -> None:
    """Call a chord of chains."""
    chord([steps(n, seconds) for n in range(MANY)])(total.s(label))


EXPECTED = sum_of(MANY) + MANY * (STEPS - 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "members"])
def test_steps_cost_fewer_transactions_than_tasks(
    make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker, kind: str
) -> None:
    patient = {"pgbarrier_publish_grace": 30.0, "pgbarrier_republish_after": 60.0}
    scene = make_scene(database_url, redis_broker, **patient)
    worker = warm(scene)
    done = scene.finished()
    worker.send(signal.SIGSTOP)
    if kind == "alone":
        result = group(steps(n) for n in range(MANY))()
    else:
        result = chord([steps(n) for n in range(MANY)])(total.s("chains"))
    worker.send(signal.SIGCONT)
    found = result.get(timeout=60)
    assert found == ([n + 2 for n in range(MANY)] if kind == "alone" else EXPECTED)
    wait_until(lambda: not scene.open(), 30, scene.report)
    assert scene.query(TRANSACTIONS)[0][0] < MANY * STEPS * 0.7
    count = done + MANY * STEPS + (kind == "members")
    assert scene.query(RUNS) == [(count, 1, 0)]
    assert scene.republished() == 0


@pytest.mark.slow
def test_links_of_a_backlog_are_sent_once(scene: Scene, tmp_path: Path) -> None:
    path = str(tmp_path / "heard")
    worker = warm(scene)
    worker.send(signal.SIGSTOP)
    result = group(add.s(n, 0).set(link=heard.s(path)) for n in range(MANY))()
    worker.send(signal.SIGCONT)
    assert result.get(timeout=60) == [*range(MANY)]
    wait_until(lambda: not scene.open(), 30, scene.report)
    wait_until(lambda: len(notes(path)) >= MANY, 30, scene.report)
    assert sorted(map(int, notes(path))) == [*range(MANY)]


@pytest.mark.slow
def test_processes_are_killed_amid_chains(scene: Scene) -> None:
    worker = warm(scene)
    labels = [f"kill {number}" for number in range(6)]
    for label in labels:
        submit(scene, label, 0.005)
    for share in range(1, 7):
        want = share * len(labels) * MANY * STEPS // 8
        wait_until(lambda want=want: scene.finished() >= want, 60, scene.report)
        worker.kill_children()
    scene.wait_settled({"warm": sum_of(6), **dict.fromkeys(labels, EXPECTED)}, 90)


@pytest.mark.slow
def test_workers_are_killed_amid_chains(scene: Scene) -> None:
    """What was left in a parent that dies is run again, and no step of it was sent before."""
    workers = [warm(scene), scene.worker(concurrency=2)]
    labels = [f"kill {number}" for number in range(6)]
    for label in labels:
        submit(scene, label, 0.002)
    for share in (1, 2, 3):
        want = share * len(labels) * MANY * STEPS // 5
        wait_until(lambda want=want: scene.finished() >= want, 90, scene.report)
        workers[share % 2].kill()
        workers[share % 2].start()
    scene.wait_settled({"warm": sum_of(6), **dict.fromkeys(labels, EXPECTED)}, 90)


@pytest.mark.slow
def test_a_worker_ends_amid_chains(scene: Scene) -> None:
    """Warm shutdown: what was left is committed, and its steps are at the broker, when it ends."""
    worker = warm(scene)
    labels = [f"end {number}" for number in range(4)]
    for label in labels:
        submit(scene, label)
    for share in range(1, 4):
        want = share * len(labels) * MANY * STEPS // 5
        wait_until(lambda want=want: scene.finished() >= want, 60, scene.report)
        assert worker.stop() == 0
        assert scene.query("SELECT id FROM pgbarrier_task WHERE state = 'running'") == []
        unmarked = "state = 'queued' AND published_at IS NULL"
        assert scene.query(f"SELECT id FROM pgbarrier_task WHERE {unmarked}") == []
        worker.start()
        worker.wait_ready()
    scene.wait_settled({"warm": sum_of(6), **dict.fromkeys(labels, EXPECTED)}, 60)
    assert scene.query("SELECT max(crashes) FROM pgbarrier_task") == [(0,)]


@pytest.mark.slow
def test_a_broker_that_takes_nothing_holds_up_no_outcome(
    make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker
) -> None:
    """What follows waits for it in a thread of its own, while what comes is run and committed."""
    url, few = urlsplit(redis_broker.url), 3
    with Proxy(url.port or 6379) as proxy:
        writes = urlunsplit(url._replace(netloc=f"127.0.0.1:{proxy.port}"))
        scene = make_scene(database_url, redis_broker)
        # A busy machine may leave a step to its process, which waits for the broker then.
        worker = warm(
            scene, settings={"broker_write_url": writes}, concurrency=few + 1,
            arguments=["--without-heartbeat"],
        )  # fmt: skip
        done = scene.finished()
        worker.send(signal.SIGSTOP)
        first = group(add.s(n, 1) for n in range(10))()
        chains = group(steps(n) for n in range(few))()
        plain = group(add.s(n, 1) for n in range(MANY * 5))()
        proxy.freeze()
        worker.send(signal.SIGCONT)
        expected = done + len(first) + len(chains) + len(plain)
        wait_until(lambda: scene.finished() >= expected, 60, scene.report)
        assert not chains.ready()
        proxy.heal()
        assert chains.get(timeout=60) == [n + 2 for n in range(few)]
        wait_until(lambda: not scene.open(), 30, scene.report)
        assert scene.query("SELECT max(attempt), max(crashes) FROM pgbarrier_task") == [(1, 0)]
