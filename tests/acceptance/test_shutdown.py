"""Workers that are told to end, as in a deployment."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from celery import chord

from tests.acceptance.scene import Scene, sum_of
from tests.acceptance.tasks import part, total
from tests.support.tasks import notes, sleepy
from tests.support.waiting import wait_until

SIZE = 40
RUNS = "SELECT DISTINCT attempt, crashes FROM pgbarrier_task"
HELD = """
SELECT count(*) FROM pgbarrier_task t JOIN pgbarrier_worker w ON w.id = t.worker
 WHERE w.name = :name AND t.state = 'running'
"""


@pytest.mark.slow
def test_a_rolling_restart_counts_no_crash_and_repeats_nothing(scene: Scene) -> None:
    """Each worker is told to end while it runs members of a chord."""
    workers = [scene.worker(concurrency=2, ready=False) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    for number, worker in enumerate(workers):
        scene.submit(f"restart {number}", SIZE, 0.25)
        held = {"name": worker.hostname}
        wait_until(lambda held=held: scene.query(HELD, **held)[0][0] > 0, 30, scene.report)
        assert worker.stop() == 0
        assert scene.query(HELD, **held) == [(0,)]
        worker.start()
        worker.wait_ready()
    scene.wait_settled({f"restart {number}": sum_of(SIZE) for number in range(2)})
    assert scene.query(RUNS) == [(1, 0)]
    states = scene.query("SELECT state, count(*) FROM pgbarrier_worker GROUP BY 1 ORDER BY 1")
    assert states == [("running", 2), ("stopped", 2)]


@pytest.mark.slow
def test_a_worker_killed_while_it_shuts_down_counts_no_crash(scene: Scene, tmp_path: Path) -> None:
    """As when a deployment's grace is over: the task runs again elsewhere, as often as needed."""
    worker = scene.worker(concurrency=1)
    started, gate = tmp_path / "started", tmp_path / "gate"
    chord([sleepy.s(0, str(gate), str(started)), part.s(1)])(total.s("grace"))
    wait_until(started.exists, message="the member runs")
    worker.send(signal.SIGTERM)
    stopping = "SELECT count(*) FROM pgbarrier_worker WHERE state = 'stopping'"
    wait_until(lambda: scene.query(stopping)[0][0] == 1, 30, scene.report)
    worker.kill()
    gate.touch()
    scene.worker(concurrency=1)
    scene.wait_settled({"grace": 1})
    assert notes(started) == ["0", "0"]
    member = scene.grants(sleepy.name)[0]
    assert (member.attempt, member.crashes) == (2, 0)
