"""Bodies whose results come by reference: canvases, retries, crashes, purges, lazy reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError

from celery_pgbarrier import barrier, poison, reaper, reference
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.errors import DispatchConflict, ResultsGone
from celery_pgbarrier.reference import LazyResults
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker, workers
from tests.support.tables import Tables
from tests.support.tasks import (
    add,
    echo,
    fail,
    flat_sum,
    hooked,
    identity,
    noted_error,
    notes,
    plain,
    replaced,
    xsum,
)  # fmt: skip
from tests.support.wire import Wire

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]

#: Everything goes by reference, in pages of three.
EVERYTHING = {"pgbarrier_inline_results": 0, "pgbarrier_batch_size": 3}
pytestmark = pytest.mark.settings(**EVERYTHING)


def members(count: int = 7) -> list[Any]:
    return [add.s(number, number) for number in range(count)]


def nested() -> Any:
    """A member whose result is a list of results."""
    return chain(add.s(0, 0), group(add.s(1), add.s(2)))


DOUBLES = [0, 2, 4, 6, 8, 10, 12]


def until_released(worker: InlineWorker, tables: Tables) -> None:
    """Run members until the barrier is released; the body's message waits then."""
    while tables.barrier_states() != ["released"]:
        assert worker.step() is not None


def argument(request: Any) -> Any:
    """What the first argument of a message is."""
    return json.loads(request.message.body)[0][0]


# -- what a body gets


def test_a_body_gets_a_list_through_a_small_message(worker: InlineWorker, tables: Tables) -> None:
    result = chord([echo.s("x" * 1000) for _ in range(40)], identity.s()).delay()
    until_released(worker, tables)
    request = worker.take()
    assert request is not None
    assert reference.Reference.of(argument(request)) is not None
    assert len(request.message.body) + len(json.dumps(request.message.headers)) < 2000
    assert "xxx" not in request.argsrepr
    worker.run(request)
    assert result.get(timeout=5) == [{"args": ["x" * 1000], "kwargs": {}}] * 40


@pytest.mark.parametrize(
    ("canvas", "expected"),
    [
        (lambda: chord(members(), identity.s()), DOUBLES),
        (lambda: chord(members(1), identity.s()), [0]),
        (lambda: chord(members(), echo.s(1, key=2)), {"args": [DOUBLES, 1], "kwargs": {"key": 2}}),
        (lambda: chord(members(), add.si(1, 1)), 2),
        (lambda: chord(members(), chain(xsum.s(), add.s(1))), 43),
        (lambda: chord(members(), group(xsum.s(), identity.s())), [42, DOUBLES]),
        (lambda: chord(members(), chord([xsum.s(), xsum.s()], xsum.s())), 84),
        (lambda: chord(members(), chord([chain(xsum.s(), add.s(1)), xsum.s()], xsum.s())), 85),
        (lambda: chain(group(members()), xsum.s(), add.s(1)), 43),
        (
            lambda: chord([nested(), add.s(5, 5), chord(members(), xsum.s())], echo.s()),
            {"args": [[[1, 2], 10, 42]], "kwargs": {}},
        ),
        (lambda: chord((add.s(n, n) for n in range(7)), identity.s()), DOUBLES),
        (lambda: chord([chord(members(), identity.s()), add.s(1, 1)], flat_sum.s()), 44),
    ],
    ids=["list", "one", "more arguments", "immutable", "chain", "group", "chord", "chord of chains",
         "upgraded group", "nested", "generator", "body that is a member"],
)  # fmt: skip
def test_every_canvas_gets_the_results(
    worker: InlineWorker, canvas: Callable[[], Any], expected: Any
) -> None:
    result = canvas().delay()
    worker.drain()
    assert result.get(timeout=5) == expected


def test_members_that_were_added_come_with_the_others(worker: InlineWorker, hook: Hook) -> None:
    @hook("adds")
    def adds(task: Any, value: Any) -> None:
        task.add_to_chord(add.si(10, 10))

    result = chord([*members(), hooked.s(1, "adds")], identity.s()).delay()
    worker.drain()
    assert sorted(result.get(timeout=5)) == [0, 1, 2, 4, 6, 8, 10, 12, 20]


@pytest.mark.settings(**{**EVERYTHING, "task_ignore_result": True})
def test_ignored_results_are_read_too(worker: InlineWorker, hook: Hook) -> None:
    seen: list[Any] = []
    hook("sees")(lambda task, value: seen.append(value))
    chord(members(), hooked.s("sees")).delay()
    worker.drain()
    assert seen == [DOUBLES]


@pytest.mark.parametrize("body", [plain.identity.s(), "elsewhere"])
def test_tasks_that_cannot_read_get_the_list_by_value(
    app: Celery, worker: InlineWorker, tables: Tables, body: Any
) -> None:
    """A plain task; one that is not registered here, and may be a plain one elsewhere."""
    chord(members(), app.signature("elsewhere") if body == "elsewhere" else body).delay()
    until_released(worker, tables)
    with app.connection_for_read() as connection:
        message = app.amqp.queues[app.conf.task_default_queue](connection.default_channel).get()
        assert json.loads(message.body)[0] == [DOUBLES]


@pytest.mark.settings(pgbarrier_inline_results=1500)
@pytest.mark.parametrize(("size", "by_reference"), [(2, False), (30, True)])
def test_the_setting_tells_from_which_size_on(
    worker: InlineWorker, tables: Tables, size: int, by_reference: bool
) -> None:
    chord(members(size), identity.s()).delay()
    until_released(worker, tables)
    request = worker.take()
    assert (reference.Reference.of(argument(request)) is not None) is by_reference


def test_the_releaser_reads_no_results(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire
) -> None:
    app = make_app(redis_broker, databases.backend_url(wire.url), **EVERYTHING)
    result = chord(members(), xsum.s()).delay()
    with workers(app, redis_broker) as make:
        worker = make()
        for _ in range(6):
            worker.step()
        wire.said.clear()
        worker.step()
        assert [said for said in wire.said if "SELECT id, result" in said] == []
        wire.said.clear()
        worker.step()
        pages = [said for said in wire.said if "SELECT id, result" in said]
        assert len(pages) == 3, "7 results in pages of 3, by the body's task"
    assert result.get(timeout=5) == 42


# -- failures


@pytest.mark.parametrize("ignored", [False, True])
def test_a_member_that_failed_fails_the_chord(
    worker: InlineWorker, tables: Tables, tmp_path: Any, ignored: bool
) -> None:
    path = str(tmp_path / "errors")
    header = [*members(4), fail.s("seen first"), *members(3), fail.s("seen later")]
    for member in header:
        member.set(ignore_result=ignored)
    result = chord(header, xsum.s().set(link_error=[noted_error.s(path)])).delay()
    worker.drain()
    assert isinstance(result.result, ChordError)
    assert "seen first" in str(result.result)
    assert notes(path) == [result.id]
    assert tables.barrier_states() == ["failed"]


def test_a_body_that_fails_calls_its_errbacks(worker: InlineWorker, tmp_path: Any) -> None:
    path = str(tmp_path / "errors")
    body = fail.s().set(link_error=[noted_error.s(path)])
    result = chord(members(), body).delay()
    worker.drain()
    assert result.state == "FAILURE"
    assert notes(path) == [result.id]


def test_results_that_are_gone_are_named(worker: InlineWorker, tables: Tables) -> None:
    result = chord(members(), xsum.s()).delay()
    until_released(worker, tables)
    tables.ask("UPDATE pgbarrier_task SET result = NULL WHERE position = 5")
    worker.drain()
    assert isinstance(result.result, ResultsGone)


# -- a body that runs more than once


def test_a_retried_body_reads_again(worker: InlineWorker, hook: Hook) -> None:
    seen: list[Any] = []

    @hook("retries")
    def retries(task: Any, value: Any) -> Any:
        seen.append(value)
        if task.request.retries < 2:
            raise task.retry(countdown=0)
        return sum(value)

    result = chord(members(), hooked.s("retries")).delay()
    worker.drain()
    assert seen == [DOUBLES] * 3
    assert result.get(timeout=5) == 42


def test_a_body_that_dies_reads_again(
    backend: BarrierBackend, make_worker: Callable[..., InlineWorker], tables: Tables, hook: Hook
) -> None:
    """Its claim is released; the message that is published again holds the reference."""
    seen: list[Any] = []
    hook("sees")(lambda task, value: seen.append(value))
    chord(members(), hooked.s("sees")).delay()
    worker = make_worker("dies")
    until_released(worker, tables)
    request = worker.take()
    assert request is not None
    lose(tables, request.id)
    tables.expire()
    assert reaper.run_once(backend).tasks_released == 1
    make_worker("goes on").drain()
    assert seen == [DOUBLES]


def test_a_body_replaces_itself(worker: InlineWorker, hook: Hook) -> None:
    """By a task that gets the list, or one that gets what the message held."""
    seen: list[Any] = []
    hook("sees")(lambda task, value: seen.append(value))

    @hook("replaces")
    def replaces(task: Any, value: Any) -> Any:
        raise task.replace(hooked.s(task.request.args[0], "sees"))

    chord(members(), hooked.s("replaces")).delay()
    worker.drain()
    result = chord([*members(2), replaced.s(add.s(3, 3))], identity.s()).delay()
    worker.drain()
    assert seen == [DOUBLES]
    assert result.get(timeout=5) == [0, 2, 6]


# -- nothing that is still read is purged


def test_rows_stay_while_a_body_waits_to_read_them(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    result = chord(members(), group(xsum.s(), xsum.s())).delay()
    until_released(worker, tables)
    tables.expire()
    assert reaper.purge(backend) == 0
    worker.step()
    assert reaper.purge(backend) == 0, "one of two tasks has read them"
    worker.step()
    assert result.get(timeout=5) == [42, 42]
    tables.expire()
    assert reaper.purge(backend) > 7
    assert tables.count("barrier") == tables.count("task", "barrier_id IS NOT NULL") == 0


@pytest.mark.settings(**EVERYTHING, pgbarrier_max_crashes=1)
def test_a_body_that_is_kept_as_poison_keeps_what_it_reads(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, hook: Hook
) -> None:
    seen: list[Any] = []
    hook("sees")(lambda task, value: seen.append(value))
    result = chord(members(), hooked.s("sees")).delay()
    until_released(worker, tables)
    body = worker.take()
    assert body is not None
    lose(tables, body.id)
    assert reaper.run_once(backend).tasks_failed == 1
    assert result.state == "FAILURE"
    tables.ask("UPDATE pgbarrier_barrier SET expires_at = clock_timestamp() - interval '1 s'")
    reaper.purge(backend)
    assert tables.count("task", "barrier_id IS NOT NULL") == 7
    poison.retry(backend, body.id)
    reaper.purge(backend)
    worker.drain()
    assert seen == [DOUBLES]


def lose(tables: Tables, task_id: str) -> None:
    """Let a task be claimed by a worker that is no more."""
    tables.ask(
        "UPDATE pgbarrier_task SET state = 'running', token = gen_random_uuid(), attempt = 1,"
        " worker = gen_random_uuid(), due_at = NULL WHERE id = :id",
        id=task_id,
    )


def test_results_that_are_forgotten_are_read_all_the_same(
    worker: InlineWorker, tables: Tables
) -> None:
    result = chord(members(), xsum.s()).delay()
    until_released(worker, tables)
    result.parent.forget()
    for member in result.parent.results:
        member.forget()
        assert member.state == "PENDING"
    worker.drain()
    assert result.get(timeout=5) == 42


def test_ids_are_not_used_again_while_their_results_are_read(
    app: Celery, worker: InlineWorker, tables: Tables
) -> None:
    signature = chord(members(), chord([xsum.s()], xsum.s()), app=app)
    signature.freeze()
    again = signature.clone()
    result = signature.delay()
    until_some_released(worker, tables)
    with pytest.raises(DispatchConflict):
        again.delay()
    worker.drain()
    assert result.get(timeout=5) == 42


def until_some_released(worker: InlineWorker, tables: Tables) -> None:
    while "released" not in tables.barrier_states():
        assert worker.step() is not None


# -- lazy


@pytest.fixture
def lazy(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(app.tasks["test.hooked"], "pgbarrier_lazy_results", True)
    return


def test_a_task_may_read_page_by_page(worker: InlineWorker, hook: Hook, lazy: None) -> None:
    @hook("looks")
    def looks(task: Any, value: Any) -> Any:
        assert isinstance(value, LazyResults)
        assert isinstance(value, Sequence)
        with pytest.raises(IndexError):
            value[7]
        return {
            "len": len(value),
            "list": list(value),
            "ends": [value[0], value[-1]],
            "slice": value[2:5],
            "steps": value[::-3],
            "reversed": list(reversed(value)),
            "in": [8 in value, 7 in value],
            "repr": repr(value),
        }

    result = chord(members(), hooked.s("looks")).delay()
    worker.drain()
    assert result.get(timeout=5) == {
        "len": 7,
        "list": DOUBLES,
        "ends": [0, 12],
        "slice": [4, 6, 8],
        "steps": [12, 6, 0],
        "reversed": DOUBLES[::-1],
        "in": [True, False],
        "repr": "<LazyResults: 7 results>",
    }


@pytest.mark.parametrize("header", ["nested", "added"])
def test_headers_without_fixed_positions_are_read_as_lists(
    worker: InlineWorker, hook: Hook, lazy: None, header: str
) -> None:
    @hook("adds")
    def adds(task: Any, value: Any) -> None:
        task.add_to_chord(add.si(10, 10))

    hook("type")(lambda task, value: [type(value).__name__, value])
    parts = [nested()] if header == "nested" else [hooked.s(1, "adds")]
    result = chord([add.s(1, 1), *parts], hooked.s("type")).delay()
    worker.drain()
    kind, values = result.get(timeout=5)
    assert (kind, sorted(map(str, values))) == (
        ("list", ["2", "[1, 2]"]) if header == "nested" else ("list", ["1", "2", "20"])
    )


def test_a_lazy_sequence_reads_a_page_once() -> None:
    asked: list[tuple[int, int]] = []

    def fetch(start: int, stop: int) -> list[int]:
        asked.append((start, stop))
        return list(range(start, stop))

    values = LazyResults(fetch, 10, 4)
    assert [values[n] for n in range(10)] == list(range(10))
    assert asked == [(0, 4), (4, 8), (8, 10)]


# -- many


@pytest.mark.settings(pgbarrier_batch_size=1000)
def test_five_thousand_results_go_through_a_message_of_a_kilobyte(
    backend: BarrierBackend, worker: InlineWorker, redis_broker: Broker, tables: Tables
) -> None:
    result = chord(members(5000), xsum.s()).delay()
    redis_broker.purge()
    meta = {"status": "SUCCESS", "result": 3, "traceback": None, "children": []}
    tables.ask(
        "UPDATE pgbarrier_task SET state = 'done', status = 'SUCCESS', message = NULL,"
        " due_at = NULL, result = CAST(:meta AS bytea)", meta=json.dumps(meta).encode(),
    )  # fmt: skip
    tables.ask("UPDATE pgbarrier_barrier SET state = 'ready', ready_at = clock_timestamp()")
    (row,) = tables.ask("SELECT id FROM pgbarrier_barrier")
    assert barrier.release(backend, row.id)
    request = worker.take()
    assert request is not None
    assert len(request.message.body) < 1024
    worker.run(request)
    assert result.get(timeout=5) == 15000
