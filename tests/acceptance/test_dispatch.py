"""A chord call whose producer is killed, and one whose broker is stopped."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median

import pytest

from celery_pgbarrier.embedded import EmbeddedBroker
from tests.acceptance.producer import Job, Producer, Report
from tests.acceptance.scene import Scene, sum_of
from tests.support.brokers import Broker
from tests.support.waiting import wait_until

SIZE = 300
AT_RANDOM, AT_FAULTS = 38, 4
BEFORE, AFTER = "dispatch.captured", ("dispatch.committed", "dispatch.half-published")

THERE = """
SELECT (SELECT count(*) FROM pgbarrier_barrier) AS barriers,
       (SELECT count(*) FROM pgbarrier_task WHERE barrier_id IS NOT NULL) AS members,
       (SELECT count(*) FROM pgbarrier_task WHERE barrier_id IS NULL) AS others
"""


def moment(chance: random.Random, calls: list[float]) -> float:
    """When to kill: anywhere in a call, or, as often, in its last part, where the commit is."""
    first = chance.choice([0.0, 0.8])
    return chance.uniform(first, 1.0) * median(calls)


def killed_producers(scene: Scene, chance: random.Random) -> list[tuple[Job, Report]]:
    """Kill 50 producers: at random delays up to that of a whole call, and at each fault point.

    A call that has returned by its moment is not one of the 50.
    """
    with Producer(scene) as producer:
        whole = [producer.run(Job(f"whole {n}", SIZE)) for n in range(2)]
        assert all(report.returned for report in whole)
        calls = [report.seconds for report in whole]
        faults = [fault for fault in (BEFORE, *AFTER) for _ in range(AT_FAULTS)]
        moments = [*faults, *[None] * AT_RANDOM]
        chance.shuffle(moments)
        done = []
        for number, fault in enumerate(moments):
            while True:
                delay = None if fault else moment(chance, calls)
                job = Job(f"{fault or 'random'} {number} {len(done)}", SIZE, delay, fault)
                done.append((job, producer.run(job)))
                if done[-1][1].killed:
                    break
                calls.append(done[-1][1].seconds)
        print(f"a whole call takes {median(calls) * 1000:.0f} ms")
    return [*((Job(report.label, SIZE), report) for report in whole), *done]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_producer_leaves_a_whole_chord_or_none(
    scene: Scene, chance: random.Random
) -> None:
    start = time.monotonic()
    done = killed_producers(scene, chance)
    scene.worker(ready=False, pool="threads", concurrency=8, arguments=["--loglevel=WARNING"])
    killed = [job for job, report in done if report.killed]
    assert len(killed) == AT_RANDOM + (1 + len(AFTER)) * AT_FAULTS
    dispatched = time.monotonic()
    wait_until(lambda: not scene.open(), 180, scene.report, interval=0.2)
    end = time.monotonic()

    there = set(scene.totals())
    scene.wait_settled({label: sum_of(SIZE) for label in there})
    assert scene.query(THERE) == [(len(there), len(there) * SIZE, len(there))]
    assert there >= {job.label for job, report in done if report.returned}
    assert there >= {job.label for job in killed if job.fault in AFTER}
    assert there.isdisjoint(job.label for job in killed if job.fault == BEFORE)
    at_random = [job.label in there for job in killed if job.delay is not None]
    print(
        f"{len(killed)} producers killed; of {len(at_random)} chords killed at random "
        f"{sum(at_random)} were there; {dispatched - start:.1f} s of dispatching, "
        f"{end - dispatched:.1f} s more until all {len(there)} chords were complete, "
        f"{scene.republished()} messages sent again"
    )
    assert set(at_random) == {True, False}, "all kills fell on one side of the commit"


def test_a_chord_is_submitted_while_the_broker_is_stopped(
    make_scene: Callable[..., Scene],
    database_url: str,
    own_redis: EmbeddedBroker,
    own_broker: Broker,
) -> None:
    scene = make_scene(database_url, own_broker)
    scene.worker()
    own_redis.stop()
    start = time.monotonic()
    scene.submit("away", 20)
    took = time.monotonic() - start
    assert scene.query("SELECT count(*) FROM pgbarrier_task WHERE state = 'queued'") == [(20,)]
    assert took < 10
    own_redis.start()
    back = time.monotonic()
    scene.wait_settled({"away": sum_of(20)})
    print(f"returned after {took:.2f} s, complete {time.monotonic() - back:.1f} s after the start")
