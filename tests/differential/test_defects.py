"""The defects of Celery's Redis backend that the comparison allows for, each shown by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.differential.canvases import Node
from tests.differential.rules import AGREED, STRANDED, TWICE, UNNAMED, verdict
from tests.differential.running import Side

pytestmark = [
    # What Celery's Redis backend uses of its client.
    pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header"),
    pytest.mark.filterwarnings("ignore:Exception raised outside body"),
]

MakeSides = Callable[..., AbstractContextManager[list[Side]]]
OK, FAIL = Node("ok"), Node("fail")


def chain(*parts: Node) -> Node:
    return Node("chain", parts)


def chord(*parts: Node) -> Node:
    return Node("chord", parts)


def group(*parts: Node) -> Node:
    return Node("group", parts)


#: Chords that Celery's Redis backend leaves pending, with no message left.
PENDING = {
    "the header of an inner chord fails": chord(chord(FAIL, OK), OK, OK),
    "the header of a chord in a chain fails": chord(chain(OK, chord(FAIL, OK)), OK, OK),
    "the header fails of a chord whose body is a chord": chord(FAIL, chord(OK, OK)),
    "a chord fails before a group that ends a chain": chord(
        chain(chord(FAIL, OK), OK, group(OK, OK)), OK
    ),
    "a task fails before a group that ends a chain": chord(
        chain(OK, group(FAIL), OK, group(OK, OK)), OK
    ),
    "a chord of an inner chord fails": chord(chord(chord(FAIL, OK), OK), OK),
}


@pytest.mark.parametrize("name", PENDING)
def test_celery_strands_a_chord(make_sides: MakeSides, name: str) -> None:
    """Ours fails it, whichever task class."""
    canvas = PENDING[name]
    with make_sides("redis", "claimed", "plain") as (redis, *both):
        theirs = redis.run(canvas)
        assert theirs.outcome == ("PENDING", None)
        for ours in both:
            seen = ours.run(canvas)
            assert seen.outcome.startswith("FAILURE ChordError")
            assert verdict(canvas, theirs, seen) == STRANDED
            assert ours.left_open() == []


def test_celery_starts_a_chord_after_a_group_body_once_for_each_task(make_sides: MakeSides) -> None:
    """With the same ids: its header runs twice.  Ours refuses the second start while it runs."""
    canvas = chain(chord(OK, group(OK, OK)), chord(OK, OK))
    with make_sides("redis", "claimed", "plain") as (redis, *both):
        theirs = redis.run(canvas)
        assert theirs.told["task3 runs, retries: 0"] == 2
        for ours in both:
            seen = ours.run(canvas)
            assert seen.told["task3 runs, retries: 0"] == 1
            assert seen.outcome == theirs.outcome
            assert verdict(canvas, theirs, seen) == TWICE
            assert ours.left_open() == []


def test_celery_starts_a_group_after_a_group_once_for_each_task(make_sides: MakeSides) -> None:
    """Inside of a group; ours fails the tasks of the middle group that come second."""
    canvas = group(chain(group(OK, OK), group(OK, OK), group(OK, OK)), OK)
    with make_sides("redis", "claimed") as (redis, ours):
        theirs, seen = redis.run(canvas), ours.run(canvas)
        assert max(theirs.told.values()) == 2
        assert max(seen.told.values()) == 1
        assert seen.outcome == theirs.outcome
        assert verdict(canvas, theirs, seen) == TWICE
        assert ours.left_open() == []


def test_celery_does_not_name_the_member_of_a_nested_header_that_failed(
    make_sides: MakeSides,
) -> None:
    canvas = chord(chain(OK, group(FAIL, OK)), OK)
    with make_sides("redis", "claimed", "plain") as (redis, *both):
        theirs = redis.run(canvas)
        assert theirs.outcome == "FAILURE ChordError: Join error: ValueError('task1')"
        for ours in both:
            seen = ours.run(canvas)
            assert seen.outcome == "FAILURE ChordError: Dependency <id> raised ValueError('task1')"
            assert verdict(canvas, theirs, seen) == UNNAMED
        canvas = chord(chain(OK, group(FAIL, OK)), group(OK))
        theirs = redis.run(canvas)
        assert theirs.outcome == ["FAILURE ChordError: Join error: ValueError('task1')"]
        for ours in both:
            seen = ours.run(canvas)
            assert seen.outcome == ["FAILURE ValueError: task1"]
            assert verdict(canvas, theirs, seen) == UNNAMED


def test_what_differs_without_a_name_is_no_agreement(make_sides: MakeSides) -> None:
    """The comparison can fail."""
    with make_sides("redis", "claimed") as (redis, ours):
        fine, other = chord(OK, OK), chord(OK, OK, OK)
        assert verdict(fine, redis.run(fine), ours.run(fine)) == AGREED
        assert verdict(fine, redis.run(fine), ours.run(other)) is None
        failing, late = chord(FAIL, OK), chord(OK, FAIL)
        assert verdict(failing, redis.run(failing), ours.run(late)) is None
