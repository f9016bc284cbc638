"""Errbacks: where they are linked, how often they are called, and with what.

Each test is run with claimed tasks, with plain ones, and on Celery's Redis backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group

from tests.support.tasks import notes
from tests.support.world import World

pytestmark = [
    # What Celery's Redis backend uses of its client.
    pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header"),
]


class Errbacks:
    """Makes errbacks of one arity, and counts how often each was called."""

    def __init__(self, world: World, arity: int, prefix: str) -> None:
        self.world, self.arity, self.prefix = world, arity, f"{prefix}-"

    def __call__(self, label: str) -> Any:
        path = f"{self.world.path}.{self.prefix}{label}"
        if self.arity == 1:
            return self.world.t.noted_error.s(path)
        return self.world.t.noted_failure.s(path=path)

    def on(self, signature: Any, label: str) -> Any:
        """Link one to a signature, which is returned."""
        signature.link_error(self(label))
        return signature

    def calls(self) -> dict[str, int]:
        """How often each was called."""
        start = f"{self.world.path.name}.{self.prefix}"
        paths = self.world.path.parent.glob(f"{start}*")
        return {path.name.removeprefix(start): len(notes(path)) for path in paths}


Canvas = Callable[[Any, Errbacks], Any]

#: What is linked where, and how often each is called with ``task_allow_error_cb_on_chord_header``
#: off and on.  A group body calls its errbacks once for each of its tasks.
CANVASES: dict[str, tuple[Canvas, dict[str, int], dict[str, int]]] = {
    "a member": (
        lambda t, e: chord([e.on(t.fail.s(), "member"), t.add.s(1, 1)], t.xsum.s()),
        {"member": 1}, {"member": 1},
    ),
    "the body": (
        lambda t, e: chord([t.fail.s(), t.add.s(1, 1)], e.on(t.xsum.s(), "body")),
        {"body": 1}, {"body": 1},
    ),
    "the body, two failures": (
        lambda t, e: chord([t.fail.s(), t.fail.s()], e.on(t.xsum.s(), "body")),
        {"body": 1}, {"body": 1},
    ),
    "the chord": (
        lambda t, e: e.on(chord([t.fail.s(), t.add.s(1, 1)], t.xsum.s()), "chord"),
        {"chord": 1}, {"chord": 2},
    ),
    "the chord, whose body fails": (
        lambda t, e: e.on(chord([t.add.s(1, 1)], t.fail.si()), "chord"),
        {"chord": 1}, {"chord": 1},
    ),
    "the chord, two failures": (
        lambda t, e: e.on(chord([t.fail.s(), t.fail.s()], t.xsum.s()), "chord"),
        {"chord": 1}, {"chord": 3},
    ),
    "the first step of a chain body": (  # sic: Celery looks at the chain's own errbacks only
        lambda t, e: chord([t.fail.s()], chain(e.on(t.xsum.s(), "first"), t.add.s(1))),
        {}, {},
    ),
    "the last step of a chain body": (  # sic
        lambda t, e: chord([t.fail.s()], chain(t.xsum.s(), e.on(t.add.s(1), "last"))),
        {}, {},
    ),
    "a chain body": (
        lambda t, e: chord([t.fail.s()], e.on(chain(t.xsum.s(), t.add.s(1)), "chain")),
        {"chain": 1}, {"chain": 1},
    ),
    "a chain body that fails": (
        lambda t, e: chord([t.add.s(1, 1)], e.on(chain(t.fail.si(), t.add.s(1)), "chain")),
        {"chain": 1}, {"chain": 1},
    ),
    "a member of a group body": (
        lambda t, e: chord([t.fail.s()], group(e.on(t.xsum.s(), "member"), t.identity.s())),
        {"member": 1}, {"member": 1},
    ),
    "a group body": (
        lambda t, e: chord([t.fail.s()], e.on(group(t.xsum.s(), t.identity.s()), "group")),
        {"group": 2}, {"group": 2},
    ),
    "a group body of which one fails": (
        lambda t, e: chord([t.add.s(1, 1)], e.on(group(t.fail.si(), t.identity.s()), "group")),
        {"group": 1}, {"group": 1},
    ),
    "a chord with a group body": (
        lambda t, e: e.on(chord([t.fail.s()], group(t.xsum.s(), t.identity.s())), "chord"),
        {"chord": 2}, {"chord": 3},
    ),
    "a chain in the header, and the body": (
        lambda t, e: chord(
            [e.on(chain(t.fail.s(), t.add.s(1)), "chain"), t.add.s(1, 1)], e.on(t.xsum.s(), "body")
        ),
        {"chain": 1, "body": 1}, {"chain": 1, "body": 1},
    ),
    "a chord in a chain, and what follows": (
        lambda t, e: chain(
            e.on(chord([t.fail.s()], t.xsum.s()), "chord"), e.on(t.add.s(1), "after")
        ),
        {"chord": 1}, {"chord": 2},
    ),
    "a chain with a group": (
        lambda t, e: e.on(
            chain(group(t.fail.s(), t.add.s(1, 1)), t.xsum.s(), t.add.s(1)), "chain"
        ),
        {"chain": 1}, {"chain": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CANVASES)
def test_errbacks(world: World, name: str) -> None:
    """Of one argument (sent as tasks) and of three (called at once), the setting off and on."""
    canvas, off, on = CANVASES[name]
    linked = []
    for arity in (1, 3):
        for setting, expected in ((False, off), (True, on)):
            # Read when an errback is linked.
            world.app.conf.task_allow_error_cb_on_chord_header = setting
            errbacks = Errbacks(world, arity, f"{arity}{setting}")
            canvas(world.t, errbacks).apply_async()
            linked.append((errbacks, expected))
    world.worker.drain()
    for errbacks, expected in linked:
        assert errbacks.calls() == expected, f"arity {errbacks.arity}, {errbacks.prefix}"
    assert world.nothing_open()


def test_an_errback_that_raises_keeps_no_other_from_being_called(world: World) -> None:
    errbacks = Errbacks(world, 3, "3")
    body = world.t.xsum.s()
    body.link_error(world.t.noted_failure.s(path="/nowhere/at/all"))
    errbacks.on(body, "body")
    result = chord([world.t.fail.s()], body).delay()
    world.worker.drain()
    assert errbacks.calls() == {"body": 1}
    assert result.state == "FAILURE"
    assert world.nothing_open()


def test_an_immutable_errback_gets_no_arguments(world: World) -> None:
    path = str(world.path)
    body = world.t.xsum.s().set(link_error=[world.t.noted.si("called", path)])
    chord([world.t.fail.s()], body).delay()
    world.worker.drain()
    assert notes(path) == ["called"]
