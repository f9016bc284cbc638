"""What members and bodies may do: add, replace, retry, start canvases of their own.

Each test is run with claimed tasks, with plain ones, and on Celery's Redis backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError, MaxRetriesExceededError

from tests.support.tasks import notes
from tests.support.world import World, value

pytestmark = [
    # What Celery's Redis backend uses of its client.
    pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header"),
    pytest.mark.filterwarnings("ignore:Exception raised outside body"),
]

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]


# -- add_to_chord


def test_a_member_adds_members(world: World, hook: Hook) -> None:
    @hook("adds")
    def adds(task: Any, value: Any) -> None:
        task.add_to_chord(world.t.add.si(10, 10))
        task.add_to_chord(world.t.add.si(20, 20))

    result = chord([world.t.hooked.s(1, "adds"), world.t.add.s(1, 1)], world.t.identity.s()).delay()
    world.worker.drain()
    assert sorted(value(result)) == [1, 2, 20, 40]
    assert world.nothing_open()


def test_a_member_that_was_added_adds_another(world: World, hook: Hook) -> None:
    @hook("adds")
    def adds(task: Any, value: int) -> None:
        if value < 4:
            task.add_to_chord(world.t.hooked.si(value + 1, "adds"))

    result = chord([world.t.hooked.s(1, "adds")], world.t.identity.s()).delay()
    world.worker.drain()
    assert sorted(value(result)) == [1, 2, 3, 4]
    assert world.nothing_open()


def test_a_member_that_is_added_lazily_is_sent_by_its_adder(world: World, hook: Hook) -> None:
    @hook("adds")
    def adds(task: Any, value: Any) -> None:
        task.add_to_chord(world.t.add.si(10, 10), lazy=True).delay()

    result = chord([world.t.hooked.s(1, "adds")], world.t.identity.s()).delay()
    world.worker.drain()
    assert sorted(value(result)) == [1, 20]


def test_a_member_that_is_added_and_fails_fails_the_chord(world: World, hook: Hook) -> None:
    @hook("adds")
    def adds(task: Any, value: Any) -> None:
        task.add_to_chord(world.t.fail.si("added"))

    body = world.t.xsum.s().set(link_error=[world.t.noted_error.s(str(world.path))])
    result = chord([world.t.hooked.s(1, "adds")], body).delay()
    world.worker.drain()
    assert isinstance(result.result, ChordError)
    assert "added" in str(result.result)
    assert notes(world.path) == [result.id]


def test_only_members_of_a_chord_add_members(world: World, hook: Hook) -> None:
    @hook("adds")
    def adds(task: Any, value: Any) -> None:
        task.add_to_chord(world.t.add.si(10, 10))

    result = world.t.hooked.delay(1, "adds")
    world.worker.drain()
    assert isinstance(result.result, ValueError)


# -- replace

REPLACEMENTS: dict[str, tuple[Callable[[World], Any], Any]] = {
    "task": (lambda w: w.t.add.s(40, 2), 42),
    "chain": (lambda w: w.t.add.s(20, 20) | w.t.add.s(2), 42),
    "group": (lambda w: group(w.t.add.s(20, 20), w.t.add.s(1, 1)), [40, 2]),
    "chord": (lambda w: chord([w.t.add.s(20, 20), w.t.add.s(1, 1)], w.t.xsum.s()), 42),
    "a task that is replaced": (lambda w: w.t.replaced.s(w.t.add.s(40, 2)), 42),
    "a task that retries": (lambda w: w.t.retry_until.s(42, 2), 42),
}


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_member_is_replaced(world: World, name: str, where: str) -> None:
    """At the first member and at the last one, which then completes the chord."""
    canvas, expected = REPLACEMENTS[name]
    header = [world.t.add.s(1, 1), world.t.add.s(2, 2)]
    position = 0 if where == "first" else len(header)
    header.insert(position, world.t.replaced.s(canvas(world)))
    result = chord(header, world.t.identity.s()).delay()
    world.worker.drain()
    values = [2, 4]
    values.insert(position, expected)
    assert value(result) == values
    assert world.nothing_open()


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_step_of_a_chain_is_replaced(world: World, name: str) -> None:
    canvas, expected = REPLACEMENTS[name]
    result = chain(
        world.t.add.s(1, 1), world.t.replaced.si(canvas(world)), world.t.identity.s()
    ).delay()
    world.worker.drain()
    assert value(result) == expected
    assert world.nothing_open()


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_a_body_is_replaced(world: World, name: str) -> None:
    canvas, expected = REPLACEMENTS[name]
    body = world.t.replaced.si(canvas(world)) | world.t.identity.s()
    result = chord([world.t.add.s(1, 1)], body).delay()
    world.worker.drain()
    assert value(result) == expected
    assert world.nothing_open()


@pytest.mark.parametrize("where", ["member", "body"])
def test_a_replacement_that_fails(world: World, where: str) -> None:
    """Its errbacks are those of what it replaces."""
    path = str(world.path)
    errback = world.t.noted_error.s(path)
    replaced = world.t.replaced.si(world.t.add.s(1, 1) | world.t.fail.si("in its place"))
    if where == "member":
        canvas = chord([replaced, world.t.add.s(1, 1)], world.t.xsum.s().set(link_error=[errback]))
    else:
        canvas = chord([world.t.add.s(1, 1)], replaced.set(link_error=[errback]))
    result = canvas.delay()
    world.worker.drain()
    assert result.state == "FAILURE"
    assert "in its place" in str(result.result)
    assert result.id in notes(path)
    assert world.nothing_open()


def test_a_replacement_that_is_a_chord_with_a_group_body(world: World) -> None:
    """Celery gives its id to no task, and a chord that waits for it waits for ever: see to it."""
    t = world.t
    replacement = chord([t.add.s(1, 1), t.add.s(2, 2)], group(t.xsum.s(), t.identity.s()))
    result = chord([t.replaced.s(replacement), t.add.s(5, 5)], t.identity.s()).delay()
    world.worker.drain()
    if world.kind == "claimed":
        assert value(result) == [[6, [2, 4]], 10]
        assert world.nothing_open()
    else:
        assert result.state == "PENDING"


def test_a_link_that_cannot_be_sent(world: World) -> None:
    """The task fails.  Ours then sends none of its links, Celery those before the bad one."""
    links = [world.t.noted.s(str(world.path)), world.t.add.si()]
    result = world.t.add.apply_async((1, 1), link=links)
    world.worker.drain()
    assert isinstance(result.result, TypeError)
    assert notes(world.path) == ([] if world.kind == "claimed" else ["2"])


# -- retries


def test_members_and_body_retry(world: World) -> None:
    header = [
        world.t.retry_until.s(1, 2),
        world.t.add.s(1, 1) | world.t.retry_until.s(1),
        chord([world.t.retry_until.s(3, 1)], world.t.retry_until.s(1)),
    ]
    result = chord(header, world.t.retry_until.s(2)).delay()
    world.worker.drain()
    assert value(result) == [1, 2, [3]]
    assert world.nothing_open()


@pytest.mark.parametrize("where", ["member", "body"])
def test_retries_that_are_spent_fail_the_chord(world: World, hook: Hook, where: str) -> None:
    @hook("never")
    def never(task: Any, value: Any) -> None:
        raise task.retry(countdown=0, max_retries=2)

    path = str(world.path)
    errback = world.t.noted_error.s(path)
    if where == "member":
        canvas = chord(
            [world.t.hooked.s(1, "never"), world.t.add.s(1, 1)],
            world.t.xsum.s().set(link_error=[errback]),
        )
    else:
        canvas = chord([world.t.add.s(1, 1)], world.t.hooked.s("never").set(link_error=[errback]))
    result = canvas.delay()
    world.worker.drain()
    assert result.state == "FAILURE"
    assert isinstance(result.result, ChordError if where == "member" else MaxRetriesExceededError)
    assert notes(path) == [result.id]
    assert world.nothing_open()


def test_a_retry_may_change_the_arguments(world: World, hook: Hook) -> None:
    @hook("other")
    def other(task: Any, value: Any) -> None:
        if value == 1:
            raise task.retry(args=(7, "other"), countdown=0)

    result = chord([world.t.hooked.s(1, "other"), world.t.add.s(1, 1)], world.t.xsum.s()).delay()
    world.worker.drain()
    assert value(result) == 9


# -- chords that running tasks start


def test_a_running_task_starts_a_chord(world: World, hook: Hook) -> None:
    started: list[Any] = []

    @hook("starts")
    def starts(task: Any, value: Any) -> str:
        started.append(chord([world.t.add.s(1, 1), world.t.add.s(2, 2)], world.t.xsum.s()).delay())
        return started[0].id

    result = chord([world.t.hooked.s(1, "starts")], world.t.identity.s()).delay()
    world.worker.drain()
    assert value(result) == [started[0].id]
    assert value(started[0]) == 6
    assert len(started) == 1
    assert world.nothing_open()


def test_a_body_starts_the_next_chord(world: World, hook: Hook) -> None:
    """Rounds: each body starts the next round, or ends."""
    last: list[Any] = []

    @hook("round")
    def next_round(task: Any, values: list[int]) -> None:
        if sum(values) < 40:
            header = [world.t.add.s(n, n) for n in values]
            last.append(chord(header, world.t.hooked.s("round")).delay())

    chord([world.t.add.s(1, 1), world.t.add.s(2, 2)], world.t.hooked.s("round")).delay()
    world.worker.drain()
    assert len(last) == 3
    assert value(last[-1]) == [16, 32]
    assert world.nothing_open()


# -- immutable signatures


def test_immutable_signatures_take_no_results(world: World) -> None:
    canvas = chain(
        chord(
            [
                world.t.add.si(1, 1) | world.t.echo.si("step"),
                group([world.t.add.si(1, 1)], immutable=True) | world.t.echo.si("after a group"),
            ],
            world.t.echo.si("body"),
        ),
        world.t.echo.si("last"),
    )
    result = canvas.delay()
    world.worker.drain()
    assert value(result) == {"args": ["last"], "kwargs": {}}
    assert value(result.parent) == {"args": ["body"], "kwargs": {}}
    steps = [child.result["args"] for child in result.parent.parent.results]
    assert steps == [["step"], ["after a group"]]


# -- depth


def _nested(world: World, kind: str, depth: int) -> Any:
    t = world.t
    if depth == 0:
        return t.add.s(1, 1)
    inner = _nested(world, kind, depth - 1)
    if kind == "chords":
        return chord([inner, t.add.s(depth, 0)], t.flat_sum.s())
    if kind == "chains":
        return chain(chord([inner, t.add.s(depth, 0)], t.flat_sum.s()), t.add.s(0))
    if kind == "bodies":
        return chord([t.add.s(depth, 0)], chain(t.flat_sum.s(), _bare(world, depth)) | t.add.s(0))
    return chord([group(inner, t.add.s(depth, 0))], t.flat_sum.s())


def _bare(world: World, depth: int) -> Any:
    if depth == 0:
        return world.t.add.s(0)
    return chord(
        [world.t.add.s(0), world.t.add.s(0)], chain(world.t.flat_sum.s(), _bare(world, depth - 1))
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("chords", 17), ("chains", 17), ("groups", 17), ("bodies", 160)],
)
def test_five_levels(world: World, kind: str, expected: int) -> None:
    result = _nested(world, kind, 5).apply_async()
    world.worker.drain()
    assert value(result) == expected
    assert world.nothing_open()


def test_an_error_at_the_fifth_level_reaches_the_outermost_body(world: World) -> None:
    """Celery's Redis backend gives up on the second level: the outer chords wait for ever."""
    t, path = world.t, str(world.path)
    canvas = t.fail.s("deep")
    for _ in range(5):
        canvas = chord([canvas, t.add.s(1, 1)], t.xsum.s().set(link_error=[t.noted_error.s(path)]))
    result = canvas.delay()
    world.worker.drain()
    if not world.ours:
        assert result.state == "PENDING"
        return
    assert isinstance(result.result, ChordError)
    assert "deep" in str(result.result)
    assert len(notes(path)) == len(set(notes(path))) == 5
    assert world.nothing_open()
