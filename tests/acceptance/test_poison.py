"""A member that kills whatever runs it: on every pool, by every way to die, on both brokers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import chord

from celery_pgbarrier import TaskCrashed, poison
from tests.acceptance.scene import Scene, sum_of
from tests.acceptance.tasks import deadly, part, total
from tests.support.brokers import Broker
from tests.support.tasks import noted_error, notes
from tests.support.waiting import wait_until

CRASHES = 2
QUICK = {
    "pgbarrier_lease": 1.5,
    "pgbarrier_heartbeat": 0.4,
    "pgbarrier_reap_interval": 0.3,
    "pgbarrier_max_crashes": CRASHES,
}
POOLS = ["prefork", "threads", "gevent", "solo"]
WAYS = ["exit", "kill", "segfault", "machine"]
EVERY = [(p, w, b) for p in POOLS for w in WAYS for b in ("redis", "rabbitmq")]
#: Each pool, each way and each broker; ``PGBARRIER_TEST_EVERY=1`` runs all that go together.
SOME = [
    ("prefork", "segfault", "redis"),
    ("threads", "exit", "rabbitmq"),
    ("gevent", "kill", "redis"),
    ("solo", "machine", "rabbitmq"),
]
CASES = EVERY if os.environ.get("PGBARRIER_TEST_EVERY") == "1" else SOME


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("pool", "way", "each_broker"),
    [
        pytest.param(*case, marks=pytest.mark.rabbitmq if case[2] == "rabbitmq" else [])
        for case in CASES
    ],
    indirect=["each_broker"],
)
def test_a_deadly_member_is_given_up(
    make_scene: Callable[..., Scene], database_url: str, each_broker: Broker, tmp_path: Path,
    pool: str, way: str,
) -> None:  # fmt: skip
    """It runs so often, fails and says why; its chord's errbacks fire once, another chord runs."""
    scene = make_scene(database_url, each_broker, **QUICK)
    ran, errors = str(tmp_path / "ran"), str(tmp_path / "errors")
    body = total.s("never").set(link_error=[noted_error.s(errors)])
    result = chord([part.s(1), deadly.s(way, ran)], body)()
    scene.submit("other", 8)
    # Not waited for: it may die before its log is looked at. What a process has in other threads
    # dies with it, and would be counted as well.
    concurrency = 1 if pool in ("threads", "gevent") else 2
    worker = scene.worker(pool=pool, concurrency=concurrency, ready=False)

    def given_up() -> bool:
        if not worker.running:
            worker.start()  # as a supervisor would
        return bool(notes(errors)) and not scene.open()

    wait_until(given_up, 150, scene.report, interval=0.1)
    assert len(notes(ran)) == CRASHES
    assert notes(errors) == [result.id]
    assert scene.totals() == {"other": [sum_of(8)]}
    member = result.parent.results[1]
    assert isinstance(member.result, TaskCrashed)
    assert f"died with its process {CRASHES} times" in str(member.result)
    assert [row.id for row in poison.listed(scene.app.backend)] == [member.id]
