"""Messages that follow from outcomes are marked as published a moment later, if they still wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from celery import chord

from tests.acceptance.scene import Scene, sum_of
from tests.acceptance.tasks import part, total
from tests.support.brokers import Broker
from tests.support.waiting import wait_until

MakeScene = Callable[..., Scene]

BODY = "SELECT state, published_at IS NOT NULL, due_at > clock_timestamp() + interval '30 seconds'"
MARKED = "SELECT count(published_at) FROM pgbarrier_task WHERE barrier_id IS NULL"


@pytest.fixture
def scene(make_scene: MakeScene, database_url: str, redis_broker: Broker) -> Scene:
    settings = {"pgbarrier_publish_grace": 8.0, "pgbarrier_republish_after": 60.0}
    return make_scene(database_url, redis_broker, **settings)


def call(scene: Scene, label: str, queue: str) -> str:
    """Call a chord whose body goes to another queue; the body's id."""
    body = total.s(label).set(queue=queue)
    return str(chord([part.s(n) for n in range(4)])(body).id)


def body(scene: Scene, task_id: str) -> tuple[str, bool, bool]:
    """A body's state, whether it is marked, and whether it has long to wait for the reaper."""
    (row,) = scene.query(f"{BODY} FROM pgbarrier_task WHERE id = '{task_id}'")
    return tuple(row)


@pytest.mark.slow
def test_what_is_claimed_at_once_needs_no_mark(scene: Scene) -> None:
    scene.worker(concurrency=2)
    for number in range(10):
        scene.submit(f"{number}", 4).get(timeout=30)
    scene.wait_settled({f"{number}": sum_of(4) for number in range(10)})
    assert scene.query(MARKED)[0][0] < 10  # one that had to wait for a second was marked
    assert scene.republished() == 0


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [32, 0], ids=["clerk", "alone"])
def test_what_waits_is_marked_before_the_reaper_publishes_it(
    make_scene: MakeScene, scene: Scene, ahead: int
) -> None:
    """Also where a worker has no clerk: its processes mark at once."""
    queue = f"{scene.broker.queue}-bodies"
    scene.worker(concurrency=2, settings={"pgbarrier_claim_ahead": ahead})
    task_id = call(scene, "late", queue)
    wait_until(lambda: scene.broker.depth(queue) == 1, 30, scene.report)
    wait_until(lambda: body(scene, task_id) == ("queued", True, True), 6, scene.report)
    assert scene.republished() == 0
    scene.worker(concurrency=1, queues=[queue])
    scene.wait_settled({"late": sum_of(4)})


@pytest.mark.slow
def test_a_worker_that_ends_marks_what_it_published(scene: Scene) -> None:
    queue = f"{scene.broker.queue}-bodies"
    worker = scene.worker(concurrency=2)
    task_id = call(scene, "left", queue)
    wait_until(lambda: scene.broker.depth(queue) == 1, 30, scene.report)
    assert worker.stop() == 0
    assert body(scene, task_id) == ("queued", True, True)
    scene.worker(concurrency=1, queues=[queue])
    scene.wait_settled({"left": sum_of(4)})
    assert scene.republished() == 0


@pytest.mark.slow
def test_a_worker_that_dies_first_costs_one_more_message(
    make_scene: MakeScene, database_url: str, redis_broker: Broker
) -> None:
    """Killed before it marked: the reaper publishes once more, and the body runs once."""
    scene = make_scene(
        database_url, redis_broker,
        pgbarrier_publish_grace=4.0, pgbarrier_republish_after=60.0, pgbarrier_lease=3.0,
    )  # fmt: skip
    queue = f"{scene.broker.queue}-bodies"
    worker = scene.worker(concurrency=2)
    task_id = call(scene, "killed", queue)
    wait_until(lambda: scene.broker.depth(queue) == 1, 30, scene.report)
    worker.kill()
    marked = body(scene, task_id)[1]  # it may have been quick
    other = scene.worker(concurrency=1)
    wait_until(lambda: marked or scene.broker.depth(queue) == 2, 30, scene.report)
    assert scene.republished() == (0 if marked else 1)
    scene.worker(concurrency=2, queues=[queue])
    scene.wait_settled({"killed": sum_of(4)})
    other.stop()
