"""The reaper as a command and as a beat task, where no worker runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from celery_pgbarrier import beat_schedule, reaper
from celery_pgbarrier.embedded import EmbeddedBroker
from tests.acceptance.producer import Job, Producer
from tests.acceptance.scene import Scene, sum_of
from tests.support.brokers import Broker
from tests.support.waiting import wait_until
from tests.support.workers import ROOT

SIZE = 20
DUE = "SELECT count(*) FROM pgbarrier_task WHERE state = 'queued' AND due_at < clock_timestamp()"


@pytest.fixture
def orphaned(make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker) -> Scene:
    """A chord whose producer died before it published anything, and a worker without a reaper."""
    scene = make_scene(
        database_url,
        redis_broker,
        pgbarrier_reap_in_worker=False,
        beat_schedule=beat_schedule(schedule=0.5),
    )
    scene.worker()
    with Producer(scene) as producer:
        report = producer.run(Job("orphaned", SIZE, fault="dispatch.committed"))
    assert report.killed
    assert not report.returned
    wait_until(lambda: scene.query(DUE) == [(SIZE,)], message="its messages are due")
    assert scene.broker.depth() == 0
    return scene


@pytest.mark.slow
def test_the_command_relays_an_unpublished_chord(orphaned: Scene) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tests.support.app", "pgbarrier", "reap", "--once"],
        cwd=ROOT,
        env={**os.environ, **orphaned.environment()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"messages published {SIZE}" in done.stdout
    orphaned.wait_settled({"orphaned": sum_of(SIZE)})


@pytest.mark.slow
def test_beat_relays_an_unpublished_chord(orphaned: Scene) -> None:
    orphaned.beat()
    orphaned.wait_settled({"orphaned": sum_of(SIZE)})
    reaped = "SELECT count(*) FROM pgbarrier_task WHERE name = 'celery_pgbarrier.reap'"
    assert orphaned.query(reaped) == [(0,)], "the reap task is never recorded"


def test_a_broker_that_forgets_again_and_again(
    make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker
) -> None:
    """What the reaper publishes, were it only to see whether anybody takes it, may be lost too."""
    scene = make_scene(database_url, redis_broker, pgbarrier_republish_after=0.5)
    scene.submit("forgotten", SIZE)
    for _ in range(3):
        assert redis_broker.purge() > 0

        def published() -> bool:
            reaper.run_once(scene.app.backend)
            return redis_broker.depth() > 0

        wait_until(published, 20, scene.report)
    scene.worker()
    scene.wait_settled({"forgotten": sum_of(SIZE)})


def test_a_broker_outage_postpones_no_later_recovery(
    make_scene: Callable[..., Scene],
    database_url: str,
    own_redis: EmbeddedBroker,
    own_broker: Broker,
) -> None:
    """Attempts to publish while the broker was away do not count as publications."""
    quick = {"republish_after": 0.5, "publish_grace": 0.1, "reap_interval": 0.1}
    settings = {f"pgbarrier_{name}": seconds for name, seconds in quick.items()}
    scene = make_scene(database_url, own_broker, **settings)
    own_redis.stop()
    scene.submit("postponed", SIZE)
    for _ in range(8):
        wait_until(lambda: scene.query(DUE) == [(SIZE,)], message="all messages are due")
        assert reaper.run_once(scene.app.backend).messages_published == 0
    own_redis.start()
    for _ in range(2):

        def published() -> bool:
            reaper.run_once(scene.app.backend)
            return own_broker.depth() > 0

        wait_until(published, 20, scene.report)
        own_broker.purge()
    scene.worker()
    scene.wait_settled({"postponed": sum_of(SIZE)})
