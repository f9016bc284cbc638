"""Options of members and bodies: times, routes, stamps, revokes, ignored results, eagerness.

Each test is run with claimed tasks, with plain ones, and on Celery's Redis backend.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import chain, chord, group
from celery.canvas import StampingVisitor
from celery.exceptions import ChordError
from celery.worker import state
from celery.worker.request import Request
from kombu import Exchange, Queue

from tests.support.tasks import notes
from tests.support.world import World, value

pytestmark = [
    # What Celery's Redis backend uses of its client.
    pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header"),
]

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]


def soon(seconds: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


# -- times


def test_countdown_eta_and_expires_are_carried(world: World) -> None:
    """The messages say when; a worker that is told to waits (see the acceptance tests)."""
    t = world.t
    eta, expires = soon(3600), soon(7200)
    header = [
        t.add.s(1, 1).set(countdown=1800),
        t.add.s(2, 2).set(eta=eta),
        t.add.s(3, 3).set(expires=expires),
    ]
    result = chord(header, t.xsum.s().set(countdown=900, expires=7200)).delay()
    counted, timed, expiring = world.worker.take_all()
    for request in (counted, timed, expiring):
        world.worker.run(request)
    body = world.worker.take()
    world.worker.run(body)
    assert _seconds_until(counted.eta) == pytest.approx(1800, abs=60)
    assert _seconds_until(timed.eta) == pytest.approx(3600, abs=60)
    assert (expiring.eta, expiring.expires) == (None, expires)
    assert _seconds_until(body.eta) == pytest.approx(900, abs=60)
    assert _seconds_until(body.request_dict["expires"]) == pytest.approx(7200, abs=60)
    assert value(result) == 12


def _seconds_until(moment: Any) -> float:
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    return float((moment - datetime.now(timezone.utc)).total_seconds())


def test_a_countdown_of_a_chord_is_that_of_its_members(world: World) -> None:
    result = chord([world.t.add.s(1, 1), world.t.add.s(2, 2)], world.t.xsum.s()).apply_async(
        countdown=1800
    )
    members = world.worker.take_all()
    assert [_seconds_until(r.eta) for r in members] == pytest.approx([1800, 1800], abs=60)
    for request in members:
        world.worker.run(request)
    body = world.worker.take()
    assert body.eta is None
    world.worker.run(body)
    assert value(result) == 6


def test_an_expired_body_is_revoked(world: World) -> None:
    body = world.t.xsum.s().set(expires=soon(-60))
    result = chord([world.t.add.s(1, 1)], body).delay()
    world.worker.drain()
    assert result.state == "REVOKED"
    assert world.nothing_open()


# -- revokes


def revoked_by_id(request: Request) -> None:
    state.revoked.add(request.id)


def revoked_by_header(request: Request) -> None:
    state.revoked_stamps["lot"] = ["bad"]


REVOKES = {"id": revoked_by_id, "stamped header": revoked_by_header}


@pytest.fixture(autouse=True)
def revoke_nothing_else() -> Any:
    yield
    state.revoked.clear()
    state.revoked_stamps.clear()


@pytest.mark.parametrize("how", REVOKES)
def test_a_revoked_member_fails_the_chord(world: World, how: str) -> None:
    member = world.t.noted.s(1, str(world.path))
    member.stamp(lot="bad")
    body = world.t.xsum.s().set(link_error=[world.t.noted_error.s(f"{world.path}.errors")])
    result = chord([member, world.t.add.s(1, 1)], body).delay()
    first, second = world.worker.take_all()
    REVOKES[how](first)
    world.worker.run(first)
    world.worker.run(second)
    world.worker.drain()
    assert first.task_name.endswith("noted")
    assert isinstance(result.result, ChordError)
    assert "TaskRevokedError" in str(result.result)
    assert notes(f"{world.path}.errors") == [result.id]
    assert notes(world.path) == [], "it never ran"
    assert world.nothing_open()


@pytest.mark.parametrize("how", REVOKES)
def test_a_revoked_body_does_not_run(world: World, how: str) -> None:
    body = world.t.noted_sum.s(str(world.path))
    body.stamp(lot="bad")
    result = chord([world.t.add.s(1, 1)], body).delay()
    world.worker.step()
    request = world.worker.take()
    REVOKES[how](request)
    world.worker.run(request)
    assert result.state == "REVOKED"
    assert notes(world.path) == []
    assert world.nothing_open()


# -- stamps


class Lots(StampingVisitor):
    """Stamps everything with one lot, and bodies as such."""

    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"lot": "blue"}

    def on_chord_body(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"part": "body"}


def test_stamps_reach_members_and_body(world: World, hook: Hook) -> None:
    seen: list[tuple[Any, Any]] = []

    @hook("look")
    def look(task: Any, value: Any) -> None:
        stamps = task.request.stamps
        assert set(stamps) <= set(task.request.stamped_headers)
        seen.append((stamps.get("lot"), stamps.get("part")))

    canvas = chord(
        [
            world.t.hooked.s(1, "look"),
            world.t.add.s(1, 1) | world.t.hooked.s("look"),
            chord([world.t.hooked.s(2, "look")], world.t.hooked.s("look")),
        ],
        world.t.hooked.s("look"),
    )
    canvas.stamp(visitor=Lots())
    canvas.apply_async()
    world.worker.drain()
    assert len(seen) == 5
    assert {lot for lot, _ in seen} == {"blue"}
    assert [part for _, part in seen].count(None) == 3
    assert world.nothing_open()


def test_a_retry_keeps_the_stamps(world: World, hook: Hook) -> None:
    seen: list[Any] = []

    @hook("look")
    def look(task: Any, value: Any) -> None:
        seen.append(task.request.stamps["lot"])
        if not task.request.retries:
            raise task.retry(countdown=0)

    canvas = chord([world.t.hooked.s(1, "look")], world.t.xsum.s())
    canvas.stamp(visitor=Lots())
    canvas.apply_async()
    world.worker.drain()
    assert seen == ["blue", "blue"]


# -- routes


def _add_queue(world: World, name: str, exchange: str = "", kind: str = "direct") -> str:
    """Make a queue of the test's own; its routing key is ``key.<name>``."""
    name = f"{world.worker.broker.queue}-{name}"
    world.app.amqp.queues.add(
        Queue(name, Exchange(exchange or name, kind), routing_key=f"key.{name}")
    )
    return name


def test_queues_of_members_and_body(world: World) -> None:
    members, bodies = _add_queue(world, "members"), _add_queue(world, "bodies")
    result = chord(
        [world.t.add.s(1, 1).set(queue=members), world.t.add.s(2, 2).set(queue=members)],
        world.t.xsum.s().set(queue=bodies),
    ).delay()
    assert world.worker.drain() == 0
    assert world.worker.drain(queue=members) == 2
    assert world.worker.drain() == 0
    assert world.worker.drain(queue=bodies) == 1
    assert value(result) == 6


def test_a_queue_of_the_chord_is_carried_to_all_but_later_steps_of_its_body(world: World) -> None:
    queue = _add_queue(world, "all")
    canvas = chord(
        [world.t.add.s(1, 1), chord([world.t.add.s(2, 2)], world.t.xsum.s())],
        world.t.xsum.s() | world.t.add.s(1),
    )
    result = canvas.apply_async(queue=queue)
    moved = world.worker.drain(queue=queue)
    world.worker.drain()
    assert (moved, value(result)) == (4, 7)


@pytest.mark.parametrize("kind", ["direct", "topic"])
def test_exchange_and_routing_key_of_members_and_body(world: World, kind: str) -> None:
    queue = _add_queue(world, kind, exchange=f"{world.worker.broker.queue}-{kind}-x", kind=kind)
    route = {"exchange": f"{world.worker.broker.queue}-{kind}-x", "routing_key": f"key.{queue}"}
    # A queue is bound when it is declared.
    with world.app.connection_for_write() as connection, connection.channel() as channel:
        world.app.amqp.queues[queue](channel).declare()
    result = chord([world.t.add.s(1, 1).set(**route)], world.t.xsum.s().set(**route)).delay()
    assert world.worker.drain(queue=queue) == 2
    assert value(result) == 2


def test_task_routes_decide_for_members_and_body(world: World) -> None:
    queue = _add_queue(world, "sums")
    world.app.conf.task_routes = {world.t.xsum.name: {"queue": queue}}
    world.app.amqp.router = world.app.amqp.Router()
    result = chord([world.t.add.s(1, 1), world.t.add.s(2, 2)], world.t.xsum.s()).delay()
    assert world.worker.drain() == 2
    assert world.worker.drain(queue=queue) == 1
    assert value(result) == 6


def test_priorities_are_carried(world: World, hook: Hook) -> None:
    seen: list[Any] = []

    @hook("look")
    def look(task: Any, value: Any) -> None:
        seen.append(task.request.delivery_info["priority"])

    header = [world.t.hooked.s(n, "look").set(priority=n) for n in (9, 3)]
    chord(header, world.t.hooked.s("look").set(priority=6)).delay()
    world.worker.drain()
    assert seen == [3, 9, 6], "Redis: the lowest number first"


# -- results that are ignored


def test_members_whose_results_are_ignored_count(world: World, hook: Hook) -> None:
    @hook("value")
    def returns(task: Any, value: Any) -> Any:
        return value

    header = [world.t.hooked_ignored.s(5, "value"), world.t.add.s(1, 1)]
    result = chord(header, world.t.identity.s()).delay()
    world.worker.drain()
    assert value(result) == [5, 2]
    assert [child.state for child in result.parent.results] == ["PENDING", "SUCCESS"]
    assert world.nothing_open()


def test_a_body_whose_result_is_ignored_runs(world: World) -> None:
    body = world.t.noted_sum.s(str(world.path)).set(ignore_result=True)
    result = chord([world.t.add.s(1, 1)], body).delay()
    world.worker.drain()
    assert notes(world.path) == ["2"]
    assert result.state == "PENDING"
    assert world.nothing_open()


def test_a_member_that_fails_with_its_result_ignored_fails_the_chord(
    world: World, hook: Hook
) -> None:
    @hook("fails")
    def fails(task: Any, value: Any) -> None:
        raise ValueError("ignored, but not overlooked")

    result = chord([world.t.hooked_ignored.s(5, "fails")], world.t.identity.s()).delay()
    world.worker.drain()
    assert isinstance(result.result, ChordError)
    assert "not overlooked" in str(result.result)
    assert world.nothing_open()


# -- eager


@pytest.mark.settings(task_always_eager=True)
def test_always_eager(world: World) -> None:
    t = world.t
    canvas = chord(
        [t.add.s(1, 1) | t.add.s(1), group(t.add.s(1, 1), t.add.s(2, 2)), t.retry_until.s(1, 2)],
        chain(t.flat_sum.s(), t.replaced.si(t.add.s(40, 2))),
    )
    assert canvas.delay().get() == 42
    assert chain(t.add.s(1, 1), t.add.s(1)).delay().get() == 3
    assert world.worker.drain() == 0
    if world.tables is not None:
        assert world.tables.count("task") == 0
        assert world.tables.count("barrier") == 0


@pytest.mark.settings(task_always_eager=True)
def test_always_eager_errors_reach_the_caller(world: World) -> None:
    result = chord([world.t.add.s(1, 1)], world.t.fail.si("eager")).delay()
    assert result.state == "FAILURE"
    with pytest.raises(ValueError, match="eager"):
        result.get()


@pytest.mark.settings(task_always_eager=True, task_store_eager_result=True)
def test_eager_results_are_stored_where_that_is_set(world: World) -> None:
    result = world.t.add.delay(1, 1)
    assert value(world.app.AsyncResult(result.id)) == 2


def test_apply_runs_a_canvas_here(world: World) -> None:
    canvas = chord([world.t.add.s(1, 1), world.t.add.s(2, 2)], world.t.xsum.s())
    assert canvas.apply().get() == 6
    assert world.worker.drain() == 0
