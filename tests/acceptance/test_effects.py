"""``self.transaction()`` under SIGKILL and SIGSTOP, with real workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.acceptance.scene import Scene
from tests.acceptance.tasks import pay
from tests.support.tasks import notes
from tests.support.waiting import wait_until


@pytest.mark.parametrize(
    ("point", "run"), [("effect.committing", 2), ("effect.committed", 1), ("body.returned", 1)]
)
def test_a_process_that_is_killed_around_the_commit(
    scene: Scene, tmp_path: Path, point: str, run: int
) -> None:
    """The effect, its message and its value are those of the run that committed."""
    fired, told = tmp_path / "fired", tmp_path / "told"
    scene.worker(concurrency=1, env={"PGBARRIER_FAULTS": f"{point}=kill@{fired}"})
    result = pay.delay("paid", str(told), str(tmp_path / "ran"))
    assert result.get(timeout=60) == run
    wait_until(lambda: notes(told) == [str(run)], 30, scene.report)
    assert fired.exists()
    scene.wait_settled({"paid": run})
    assert notes(told) == [str(run)]
    assert scene.grants(pay.name)[0].attempt == 2


def taken_over(scene: Scene, paused: int, told: Path) -> None:
    """Stop a worker with its pool; another one takes its task over and pays."""
    os.killpg(paused, signal.SIGSTOP)
    scene.worker(concurrency=1)
    wait_until(lambda: scene.totals() == {"paid": [2]}, 60, scene.report)
    wait_until(lambda: notes(told) == ["2"], 30, scene.report)


def test_a_paused_block_is_rolled_back(scene: Scene, tmp_path: Path) -> None:
    """It goes on after another run has paid: its transaction, message and value are refused."""
    told, ran, gate = tmp_path / "told", tmp_path / "ran", tmp_path / "gate"
    paused = scene.worker(concurrency=1)
    result = pay.delay("paid", str(told), str(ran), str(gate))
    wait_until(ran.exists, message="the block runs")
    taken_over(scene, paused.pid, told)
    gate.touch()
    os.killpg(paused.pid, signal.SIGCONT)
    paused.wait_log("is rolled back: this run was taken for dead")
    scene.wait_settled({"paid": 2})
    assert result.get(timeout=10) == 2
    assert notes(told) == ["2"]
    assert paused.running


def test_a_process_that_is_paused_right_before_its_commit_holds_nobody_up(
    scene: Scene, tmp_path: Path
) -> None:
    """The lock on its task's row ends with its session, which the server ends."""
    told, ran, fired = tmp_path / "told", tmp_path / "ran", tmp_path / "fired"
    paused = scene.worker(
        concurrency=1, env={"PGBARRIER_FAULTS": f"effect.committing=stop@{fired}"}
    )
    result = pay.delay("paid", str(told), str(ran))
    wait_until(fired.exists, message="the process is stopped")
    taken_over(scene, paused.pid, told)
    os.killpg(paused.pid, signal.SIGCONT)
    paused.wait_log("is rolled back: this run was taken for dead")
    scene.wait_settled({"paid": 2})
    assert result.get(timeout=10) == 2
    assert notes(told) == ["2"]
    assert paused.running
