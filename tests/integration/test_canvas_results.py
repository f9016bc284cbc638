"""Results of canvases: groups, parents and children, serializers, compression, expiry.

Where not said otherwise, each test is run with claimed tasks, with plain ones, and on Celery's
Redis backend.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError
from celery.result import AsyncResult, GroupResult, result_from_tuple
from kombu.exceptions import EncodeError

from tests.support.brokers import Broker
from tests.support.tasks import notes
from tests.support.world import KINDS, World, open_world, value

pytestmark = [
    # What Celery's Redis backend uses of its client.
    pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header"),
]

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]


# -- groups


def test_counts_of_a_group(world: World) -> None:
    result = group(world.t.add.s(1, 1), world.t.fail.s(), world.t.add.s(2, 2)).delay()
    assert (result.completed_count(), result.waiting(), result.ready()) == (0, True, False)
    world.worker.step()
    assert (result.completed_count(), result.waiting(), result.failed()) == (1, True, False)
    world.worker.drain()
    assert (result.completed_count(), result.waiting(), result.ready()) == (2, False, True)
    assert (result.failed(), result.successful()) == (True, False)
    assert len(result) == 3


def test_a_header_is_saved_restored_and_counted(world: World) -> None:
    """The parent of a chord's result is its header."""
    result = chord([world.t.add.s(n, n) for n in range(4)], world.t.xsum.s()).delay()
    result.parent.save()
    restored = GroupResult.restore(result.parent.id)
    assert restored == result.parent
    world.worker.step()
    assert restored.completed_count() == 1
    world.worker.drain()
    assert restored.completed_count() == 4
    assert [value(child) for child in restored.children] == [0, 2, 4, 6]
    assert value(result) == 12
    restored.delete()
    assert GroupResult.restore(restored.id) is None


def test_a_saved_group_of_chords_is_restored_with_its_parents(world: World) -> None:
    canvas = group(
        chord([world.t.add.s(1, 1)], world.t.xsum.s()), world.t.add.s(2, 2) | world.t.add.s(1)
    )
    result = canvas.apply_async()
    result.save()
    world.worker.drain()
    restored = GroupResult.restore(result.id)
    assert value(restored) == [2, 5]
    assert isinstance(restored.results[0].parent, GroupResult)
    assert value(restored.results[1].parent) == 4


def test_a_result_as_a_tuple_finds_its_parents(world: World) -> None:
    """How web applications keep a result: ``as_tuple``, ``result_from_tuple``."""
    result = chain(
        world.t.add.s(1, 1),
        group(world.t.add.s(1), world.t.add.s(2)),
        world.t.xsum.s(),
        world.t.add.s(10),
    ).apply_async()
    world.worker.drain()
    again = result_from_tuple(result.as_tuple(), world.app)
    assert value(again) == 17
    assert value(again.parent) == 7
    assert value(again.parent.parent) == [3, 4]
    assert value(again.parent.parent.parent) == 2


def test_forgetting_a_group_forgets_its_results_and_keeps_the_body(world: World) -> None:
    result = chord([world.t.add.s(1, 1), world.t.add.s(2, 2)], world.t.xsum.s()).delay()
    world.worker.drain()
    members = [child.id for child in result.parent.results]
    result.parent.forget()
    assert [AsyncResult(member).state for member in members] == ["PENDING", "PENDING"]
    assert value(AsyncResult(result.id)) == 6


def test_forgetting_a_member_of_a_live_chord_does_not_take_its_value(world: World) -> None:
    result = chord([world.t.add.s(1, 1), world.t.add.s(2, 2)], world.t.xsum.s()).delay()
    world.worker.step()
    result.parent.results[0].forget()
    assert result.parent.results[0].state == "PENDING"
    world.worker.drain()
    assert value(AsyncResult(result.id)) == 6


def test_children_and_parents_of_tasks(world: World, hook: Hook) -> None:
    sent: list[str] = []

    @hook("sends")
    def sends(task: Any, value: Any) -> None:
        sent.append(world.t.add.delay(1, 1).id)
        sent.append(group(world.t.add.s(2, 2), world.t.add.s(3, 3)).delay().id)

    member = world.t.hooked.s(1, "sends")
    result = chord([member], world.t.xsum.s().set(link=world.t.identity.s())).delay()
    world.worker.drain()
    children = AsyncResult(result.parent.results[0].id).children
    assert [child.id for child in children] == sent
    assert isinstance(children[1], GroupResult)
    (linked,) = AsyncResult(result.id).children
    assert value(linked) == 1


def test_requests_know_their_root_parent_and_group(world: World, hook: Hook) -> None:
    seen: dict[Any, Any] = {}

    @hook("look")
    def look(task: Any, value: Any) -> None:
        seen[len(seen)] = task.request

    result = chain(
        world.t.add.s(1, 1), group([world.t.hooked.s("look")] * 2), world.t.hooked.s("look")
    ).apply_async()
    header = result.parent
    root = header.parent.id
    world.worker.drain()
    first, second, body = seen.values()
    assert {request.root_id for request in seen.values()} == {root}
    assert (first.parent_id, second.parent_id) == (root, root)
    assert (first.group, first.group_index) == (header.id, 0)
    assert (second.group, second.group_index) == (header.id, 1)
    assert body.parent_id in {first.id, second.id}
    assert body.id == result.id


@pytest.mark.settings(result_extended=True)
def test_extended_results_of_members_and_body(world: World) -> None:
    result = chord([world.t.add.s(1, 2), world.t.add.s(2, 2)], world.t.echo.s(key="word")).delay()
    world.worker.drain()
    member, body = AsyncResult(result.parent.results[0].id), AsyncResult(result.id)
    assert (member.name, member.args, member.kwargs) == (world.t.add.name, [1, 2], {})
    assert (body.name, body.args, body.kwargs) == (world.t.echo.name, [[3, 4]], {"key": "word"})
    assert (member.queue, body.queue) == (world.worker.broker.queue,) * 2
    assert member.worker
    assert (member.retries, body.retries) == (0, 0)


# -- serializers and compression


def _mixed(world: World) -> Any:
    """A canvas that sends what a chord can send: nested, linked, retried, replaced."""
    t = world.t
    return chord(
        [
            chord([t.add.s(1, 1), t.retry_until.s(2, 1)], t.flat_sum.s()),
            t.add.s(1, 1) | t.replaced.si(t.add.s(1, 1) | t.add.s(3)),
            t.identity.s("x" * 2000),
        ],
        t.identity.s().set(link=t.noted.s(str(world.path))) | t.identity.s(),
    )


CODINGS: dict[str, dict[str, Any]] = {
    **{
        f"{name}, {compression}": {
            "task_serializer": name,
            "result_serializer": name,
            "accept_content": ["json", name],
            "task_compression": compression,
            "result_compression": compression,
        }
        for name in ("json", "pickle", "msgpack")
        for compression in (None, "gzip")
    },
    "pickled tasks, json results": {
        "task_serializer": "pickle",
        "accept_content": ["json", "pickle"],
        "result_accept_content": ["json"],
    },
    "json tasks, yaml results": {
        "result_serializer": "yaml",
        "result_accept_content": ["json", "yaml"],
        "accept_content": ["json"],
    },
    "json tasks, pickled results, bzip2": {
        "result_serializer": "pickle",
        "result_accept_content": ["json", "pickle"],
        "accept_content": ["json"],
        "result_compression": "bzip2",
    },
}


@pytest.fixture
def coded_world(
    request: pytest.FixtureRequest,
    make_app: Callable[..., Celery],
    redis_broker: Broker,
    emptied_database_url: str,
    tmp_path: Path,
) -> Any:
    kind, coding = request.param
    with open_world(
        kind, make_app, redis_broker, emptied_database_url, tmp_path / "notes", **CODINGS[coding]
    ) as world:
        yield world


def coded(kinds: Any) -> Any:
    return pytest.mark.parametrize(
        "coded_world",
        [(kind, coding) for kind in kinds for coding in CODINGS],
        ids=lambda pair: f"{pair[0]}: {pair[1]}",
        indirect=True,
    )


@coded(KINDS)
def test_a_canvas_in_every_coding(coded_world: World) -> None:
    world = coded_world
    result = _mixed(world).apply_async()
    world.worker.drain()
    assert value(result) == [4, 5, "x" * 2000]
    assert len(notes(world.path)) == 1
    assert world.nothing_open()


@coded(["claimed"])
def test_an_error_in_every_coding(coded_world: World) -> None:
    world = coded_world
    path = str(world.path)
    canvas = chain(
        chord(
            [chord([world.t.fail.s(), world.t.add.s(1, 1)], world.t.xsum.s()), world.t.add.s(1, 1)],
            world.t.xsum.s().set(link_error=[world.t.noted_error.s(path)]),
        ),
        world.t.add.s(1),
    )
    result = canvas.apply_async()
    body = result.parent
    world.worker.drain()
    assert isinstance(body.result, ChordError)
    assert "as told" in str(body.result)
    assert result.state == "FAILURE"
    assert notes(path) == [body.id]
    assert world.nothing_open()


@pytest.mark.settings(task_serializer="yaml", accept_content=["yaml", "json"])
def test_yaml_carries_tasks_but_no_signatures(world: World) -> None:
    """YAML's safe dumper refuses Celery's signatures: the chord call raises and leaves nothing."""
    result = world.t.add.delay(1, 1)
    world.worker.drain()
    assert value(result) == 2
    with pytest.raises(EncodeError, match="cannot represent an object"):
        chord([world.t.add.s(1, 1)], world.t.xsum.s()).delay()
    assert world.worker.drain() == 0
    if world.tables is not None:
        assert world.tables.count("barrier") == 0


# -- expiry (ours alone: Redis drops what has expired whether or not a chord waits for it)


@pytest.mark.settings(result_expires=1)
@pytest.mark.parametrize("world", ["claimed", "plain"], indirect=True)
def test_a_live_chord_loses_no_row(world: World) -> None:
    """A chord that lasts longer than results are kept still gets every value."""
    assert world.tables is not None
    t, path = world.t, str(world.path)
    canvas = chord(
        [chord([t.add.s(1, 1), t.add.s(2, 2)], t.xsum.s()), t.add.s(3, 3) | t.add.s(1)],
        t.identity.s() | t.noted.s(path),
    )
    result = canvas.apply_async()
    missing = """
        SELECT b.id FROM pgbarrier_barrier b LEFT JOIN pgbarrier_task t ON t.barrier_id = b.id
         WHERE b.state = 'waiting' GROUP BY b.id, b.size HAVING count(t.id) <> b.size
    """
    live_seen = 0
    while world.worker.step():
        world.tables.expire()
        world.app.backend.cleanup()
        live_seen += world.tables.count("barrier", "state = 'waiting'")
        assert world.tables.ask(missing) == []
    assert live_seen
    assert notes(path) == ["[6, 7]"]
    # Once it is over it expires like anything else.
    assert result.state == "PENDING"
    assert world.tables.count("task") == 0
    assert world.tables.count("barrier") == 0
