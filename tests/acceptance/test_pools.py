"""The same chord in every pool: a member's process is killed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import chord

from tests.acceptance.scene import Scene, sum_of
from tests.acceptance.tasks import part, total
from tests.support.brokers import Broker
from tests.support.tasks import kill_once

SIZE = 10
LATE = {"task_acks_late": True, "task_reject_on_worker_lost": True}
#: The pool of a prefork worker looks for dead processes at least so often (seconds).
POOL_LOOKS = 5.0
#: For processes that wait for a processor, on top of what G7 promises (seconds).
LOAD = 3.0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, LATE], ids=["defaults", "acks_late"])
@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_a_member_is_killed_once(
    make_scene: Callable[..., Scene],
    database_url: str,
    redis_broker: Broker,
    tmp_path: Path,
    pool: str,
    settings: dict[str, Any],
) -> None:
    """Under prefork a pool process dies, otherwise the worker, and another takes over."""
    scene = make_scene(database_url, redis_broker, **settings)
    lives = 1 if pool == "prefork" else 2
    workers = [scene.worker(pool=pool, concurrency=2, ready=False) for _ in range(lives)]
    for worker in workers:
        worker.wait_ready()
    header = [part.s(n) for n in range(SIZE - 1)]
    header.insert(SIZE // 2, kill_once.s(SIZE - 1, str(tmp_path / "killed")))
    chord(header)(total.s(pool))
    scene.wait_settled({pool: sum_of(SIZE)})

    assert [worker.running for worker in workers].count(True) == 1
    victim = scene.grants(kill_once.name)[0]
    assert (victim.attempt, victim.crashes) == (2, 1)
    gap = (victim.granted[1] - victim.granted[0]).total_seconds()
    print(f"{pool}: runs again {gap:.2f} s after its first claim")
    promised = POOL_LOOKS
    if pool != "prefork":
        lease, beat, reap = (
            scene.settings[f"pgbarrier_{name}"] for name in ("lease", "heartbeat", "reap_interval")
        )
        promised = lease + 2 * beat + reap
    assert gap < promised + LOAD
