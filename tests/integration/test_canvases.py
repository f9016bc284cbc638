"""Canvases, and what they come to: the same on Celery's Redis backend and on ours."""

from __future__ import annotations

import re
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError

from tests.support.canvases import ERRORS, LINKS, STRANDED_BY_CELERY, VALUES
from tests.support.tasks import notes
from tests.support.world import World, value

pytestmark = [
    # What Celery's Redis backend uses of its client.
    pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header"),
]


@pytest.mark.parametrize("name", VALUES)
def test_value(world: World, name: str) -> None:
    canvas, expected = VALUES[name]
    result = canvas(world).apply_async()
    world.worker.drain()
    assert value(result) == expected
    if world.ours:
        assert result.get(timeout=5) == expected
    assert world.nothing_open()


def test_results_stand_in_header_order_whatever_the_order_of_their_ends(world: World) -> None:
    header = [world.t.identity.s(n) for n in range(12)]
    result = chord(header, world.t.identity.s()).delay()
    for request in reversed(world.worker.take_all()):
        world.worker.run(request)
    world.worker.drain()
    assert value(result) == list(range(12))


def test_a_chord_does_not_poll(world: World) -> None:
    """There is no ``chord_unlock`` and nothing else beside the canvas's own tasks."""
    chord([world.t.add.s(1, 1), world.t.add.s(2, 2)], world.t.xsum.s()).delay()
    assert world.worker.drain() == 3


# -- links


@pytest.mark.parametrize("name", LINKS)
def test_link(world: World, name: str) -> None:
    canvas, expected = LINKS[name]
    canvas(world).apply_async()
    world.worker.drain()
    assert notes(world.path) == expected
    assert world.nothing_open()


# -- errors


@pytest.mark.parametrize("name", ERRORS)
def test_error_in_the_header(world: World, name: str) -> None:
    """The body never runs, its result is the ChordError, its errbacks are called once."""
    chord_ = ERRORS[name](world)
    chord_.body.set(link_error=[world.t.noted_error.s(str(world.path))])
    result = chord_.apply_async()
    world.worker.drain()
    if name in STRANDED_BY_CELERY and not world.ours:
        assert result.state == "PENDING"
        return
    assert result.state == "FAILURE"
    assert isinstance(result.result, ChordError)
    assert re.search("Dependency .* raised .*as told", str(result.result))
    assert notes(world.path) == [result.id]
    assert world.nothing_open()


def test_errback_of_three_arguments(world: World) -> None:
    body = world.t.xsum.s().set(link_error=[world.t.noted_failure.s(path=str(world.path))])
    result = chord([world.t.fail.s(), world.t.add.s(1, 1)], body).delay()
    world.worker.drain()
    assert notes(world.path) == [f"{result.id} ChordError"]


def test_errbacks_of_both_arities_on_a_member(world: World) -> None:
    path = str(world.path)
    member = world.t.fail.s().set(
        link_error=[world.t.noted_error.s(path), world.t.noted_failure.s(path=path)]
    )
    result = chord([member, world.t.add.s(1, 1)], world.t.xsum.s()).delay()
    failed = result.parent.results[0].id
    world.worker.drain()
    assert sorted(notes(world.path)) == sorted([failed, f"{failed} ValueError"])


def test_errback_of_a_chord_is_called_for_its_header(world: World) -> None:
    canvas = chord([world.t.fail.s(), world.t.add.s(1, 1)], world.t.xsum.s())
    canvas.link_error(world.t.noted_error.s(str(world.path)))
    result = canvas.delay()
    world.worker.drain()
    assert result.id in notes(world.path)
    assert len(notes(world.path)) == len(set(notes(world.path)))


def test_what_follows_a_failed_chord_fails(world: World) -> None:
    canvas = chain(chord([world.t.fail.s()], world.t.xsum.s()), world.t.add.s(1), world.t.add.s(1))
    result = canvas.apply_async()
    world.worker.drain()
    while result is not None and not hasattr(result, "results"):
        assert result.state == "FAILURE"
        result = result.parent


def test_failed_header_with_a_group_body(world: World) -> None:
    """Each task of the body fails; ours with the ChordError or its cause, as Celery's."""
    result = chord([world.t.fail.s()], group(world.t.xsum.s(), world.t.identity.s())).delay()
    world.worker.drain()
    assert [child.state for child in result.results] == ["FAILURE", "FAILURE"]
    assert all("as told" in str(child.result) for child in result.results)
    assert world.nothing_open()


def test_the_failures_of_a_group_body_stand_before_it_is_revoked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is told of the revoke looks up the tasks' states, and keeps a failure."""
    seen = []
    broadcast = world.app.control.broadcast

    def look(command: str, arguments: Any = None, **options: Any) -> Any:
        if command == "revoke":
            seen.extend(world.app.AsyncResult(task_id).state for task_id in arguments["task_id"])
        return broadcast(command, arguments=arguments, **options)

    monkeypatch.setattr(world.app.control, "broadcast", look)
    chord([world.t.fail.s()], group(world.t.xsum.s(), world.t.identity.s())).delay()
    world.worker.drain()

    # Celery 5.5 does not revoke group bodies.
    revokes = hasattr(world.app.backend, "_handle_group_chord_error")
    assert seen == (["FAILURE", "FAILURE"] if revokes else [])


def test_a_body_that_fails(world: World) -> None:
    body = world.t.fail.si("in the body").set(link_error=[world.t.noted_error.s(str(world.path))])
    result = chord([world.t.add.s(1, 1)], body).delay()
    world.worker.drain()
    assert isinstance(result.result, ValueError)
    assert str(result.result) == "in the body"
    assert notes(world.path) == [result.id]


def test_members_keep_their_own_outcomes(world: World) -> None:
    result = chord([world.t.add.s(1, 1), world.t.fail.s()], world.t.xsum.s()).delay()
    world.worker.drain()
    good, bad = result.parent.results
    assert (good.state, good.result) == ("SUCCESS", 2)
    assert (bad.state, str(bad.result)) == ("FAILURE", "as told")
    assert "ValueError" in bad.traceback
