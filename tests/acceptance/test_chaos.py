"""Chords under random kills of pool processes and workers, and a broker that forgets once."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from celery_pgbarrier.embedded import EmbeddedBroker
from tests.acceptance.scene import Scene, sum_of
from tests.acceptance.tasks import BODY
from tests.support.brokers import Broker
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

CHORDS, SIZE, SECONDS = 20, 50, 0.04
CHILDREN, WORKERS = 18, 6
#: Chords whose body is killed as it begins.
MORTAL = 3

IN_A_BODY = """
SELECT count(*) FROM pgbarrier_task
 WHERE state = 'running' AND name = :name AND (pid = ANY(:pids) OR pid = 0)
"""


class Killer:
    """Kills what chance points at, and starts workers again.

    It spares a process that runs a body: these count their runs outside the claim's transaction,
    where a kill between the two would count one twice. (Some bodies kill themselves.)
    """

    def __init__(self, scene: Scene, workers: list[WorkerProcess], chance: random.Random) -> None:
        self.scene, self.workers, self.chance = scene, workers, chance
        self.children = self.restarts = 0

    def child(self) -> None:
        """SIGKILL a process of a pool."""
        wait_until(self._kill_child, 30, self.scene.report)
        self.children += 1

    def worker(self) -> None:
        """SIGKILL a worker with its pool, and start it again."""
        wait_until(self._kill_worker, 30, self.scene.report)
        self.restarts += 1

    def _kill_child(self) -> bool:
        worker = self.chance.choice(self.workers)
        if " received" not in worker.log():  # Celery ends a worker that loses one before it works
            return False
        pids = worker.children()
        pid = self.chance.choice(pids) if pids else 0
        if not self._stopped([pid]):
            return False
        with suppress(ProcessLookupError):  # its worker has replaced it
            os.kill(pid, signal.SIGKILL)
        return True

    def _kill_worker(self) -> bool:
        worker = self.chance.choice(self.workers)
        pids = worker.children()
        if not pids or not self._stopped([worker.pid, *pids]):
            return False
        worker.kill()
        worker.start()
        return True

    def _stopped(self, pids: list[int]) -> bool:
        """Stop processes; let them go on where one of them runs a body."""
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in filter(None, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            if number == signal.SIGSTOP and not self._in_a_body(pids):
                return any(pids)
        return False

    def _in_a_body(self, pids: list[int]) -> bool:
        return bool(self.scene.query(IN_A_BODY, name=BODY, pids=pids)[0][0])


def survive(
    scene: Scene, chance: random.Random, tmp_path: Path, forget: Callable[[], object]
) -> None:
    """Submit the chords, disturb them at random moments of their progress, see what came out."""
    workers = [scene.worker(concurrency=2, ready=False) for _ in range(2)]
    killer = Killer(scene, workers, chance)
    start = time.monotonic()
    for number in range(CHORDS):
        mortal = {"dies": str(tmp_path / f"body-{number}")} if number < MORTAL else {}
        scene.submit(f"chord {number}", SIZE, SECONDS, **mortal)
    acts = [killer.child] * CHILDREN + [killer.worker] * WORKERS
    chance.shuffle(acts)
    moments = sorted(chance.sample(range(CHORDS * SIZE * 9 // 10), len(acts)))
    schedule = [*zip(moments, acts, strict=True), (CHORDS * SIZE // 2, forget)]
    for moment, act in sorted(schedule, key=lambda item: item[0]):
        wait_until(lambda m=moment: scene.finished() >= m, 60, scene.report, interval=0.01)
        act()
    last = time.monotonic()
    scene.wait_settled({f"chord {n}": sum_of(SIZE) for n in range(CHORDS)}, 90)
    end = time.monotonic()
    assert sorted(path.name for path in tmp_path.glob("body-*")) == [
        f"body-{number}" for number in range(MORTAL)
    ]
    again = scene.query("SELECT sum(attempt - 1), sum(crashes) FROM pgbarrier_task")[0]
    print(
        f"{CHORDS} chords of {SIZE}: {killer.children} pool processes and {killer.restarts} "
        f"workers killed, {again[0]} runs repeated, {again[1]} crashes counted; "
        f"{scene.republished()} messages sent again by the reaper; "
        f"{end - start:.1f} s in all, {end - last:.1f} s after the last"
    )


@pytest.mark.slow
def test_chords_survive_kills_and_a_flushed_redis(
    make_scene: Callable[..., Scene],
    database_url: str,
    own_redis: EmbeddedBroker,
    own_broker: Broker,
    chance: random.Random,
    tmp_path: Path,
) -> None:
    scene = make_scene(database_url, own_broker)

    def flush() -> None:
        assert own_broker.depth() > 0
        own_redis.flush()
        print("FLUSHALL")

    survive(scene, chance, tmp_path, flush)


@pytest.mark.slow
def test_chords_survive_kills_and_a_purged_rabbitmq(
    make_scene: Callable[..., Scene],
    database_url: str,
    rabbitmq_broker: Broker,
    chance: random.Random,
    tmp_path: Path,
) -> None:
    scene = make_scene(database_url, rabbitmq_broker)

    def purge() -> None:
        lost = rabbitmq_broker.purge()
        print(f"{lost} messages purged")
        assert lost > 0

    survive(scene, chance, tmp_path, purge)
