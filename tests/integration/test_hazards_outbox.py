"""Hazards 1, 11, 12 and 13: what follows a run is committed with its outcome, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from celery_pgbarrier import lease, reaper
from celery_pgbarrier.backend import BarrierBackend
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import (
    add,
    hooked,
    hooked_ignored,
    identity,
    noted,
    noted_error,
    notes,
    plain,
    replaced,
    xsum,
)

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]
MakeWorker = Callable[..., InlineWorker]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


def lose_messages(broker: Broker, backend: BarrierBackend, tables: Tables) -> None:
    """Wipe the broker, and let time pass until the reaper has sent something again."""
    broker.purge()
    for _ in range(5):
        tables.overdue()
        if reaper.run_once(backend).messages_published:
            return


# -- 1

CHAINS: dict[str, tuple[Callable[[], Any], Any]] = {
    "second of two steps": (lambda: add.s(1, 1) | add.s(10), 12),
    "every step of four": (lambda: add.s(1, 1) | add.s(1) | add.s(1) | add.s(1), 5),
    "a group in a chain": (lambda: chain(add.s(1, 1), group(add.s(1), add.s(2)), xsum.s()), 7),
    "a chord in a chain": (lambda: chain(add.s(1, 1), chord([add.s(1), add.s(2)], xsum.s())), 7),
}


@pytest.mark.parametrize("name", CHAINS)
def test_hazard_01_a_chain_in_a_header_survives_the_loss_of_its_messages(
    redis_broker: Broker, backend: BarrierBackend, worker: InlineWorker, tables: Tables, name: str
) -> None:
    """After each step the broker forgets everything."""
    canvas, expected = CHAINS[name]
    result = chord([canvas(), add.s(5, 5)], identity.s()).delay()
    for _ in range(20):
        if worker.step() is None:
            break
        lose_messages(redis_broker, backend, tables)
    assert result.get(timeout=5) == [expected, 10]
    assert tables.count("task", "state <> 'done'") == 0


def test_hazard_01_members_that_are_not_published_yet_have_rows(
    worker: InlineWorker, tables: Tables
) -> None:
    result = chord([add.s(1, 1) | add.s(10), add.s(5, 5)], identity.s()).delay()
    last = result.parent.results[0]
    assert tables.task(last.id).state == "expected"
    assert tables.task(last.parent.id).state == "queued"


@pytest.mark.parametrize("kind", ["link", "body", "link of the body", "nested body"])
def test_hazard_01_what_follows_an_outcome_is_never_lost(
    redis_broker: Broker, backend: BarrierBackend, worker: InlineWorker, tables: Tables,
    tmp_path: Path, kind: str,
) -> None:  # fmt: skip
    path = tmp_path / "notes"
    told = noted.s(str(path))
    canvas = {
        "link": lambda: chord([add.s(1, 1).set(link=told)], xsum.s()),
        "body": lambda: chord([add.s(1, 1)], xsum.s() | told),
        "link of the body": lambda: chord([add.s(1, 1)], xsum.s().set(link=told)),
        "nested body": lambda: chord([chord([add.s(1, 1)], xsum.s())], xsum.s() | told),
    }[kind]()
    canvas.apply_async()
    for _ in range(20):
        if worker.step() is None:
            break
        lose_messages(redis_broker, backend, tables)
    assert notes(path) == ["2"]


# -- 11


@contextmanager
def overtaken(
    backend: BarrierBackend, stalled: InlineWorker, next_one: InlineWorker, tables: Tables
) -> Iterator[None]:
    """Bury the worker that is running this, and let another run what it held, to the end."""
    with stalled.identity():
        lease.beat(backend)
    for _ in range(2):
        tables.silence(stalled.boot.id)
        reaper.run_once(backend)
    next_one.drain()
    yield


@pytest.mark.parametrize("in_chord", [False, True])
@pytest.mark.parametrize("wakes", ["with a result", "with an error"])
def test_hazard_11_a_fenced_out_attempt_publishes_nothing(
    redis_broker: Broker, backend: BarrierBackend, make_worker: MakeWorker, tables: Tables,
    hook: Hook, tmp_path: Path, wakes: str, in_chord: bool,
) -> None:  # fmt: skip
    """No link, no chain step, no errback, no count, no outcome of a run that has passed on."""
    first, second = make_worker("first"), make_worker("second")
    links, errors, steps = (str(tmp_path / name) for name in ("links", "errors", "steps"))
    runs: list[int] = []

    @hook("stall")
    def stall(task: Any, value: Any) -> str:
        runs.append(len(runs))
        if len(runs) > 1:
            return "good"
        with overtaken(backend, first, second, tables):
            if wakes == "with an error":
                raise ValueError("too late")
        return "stale"

    task = hooked.s(1, "stall").set(link=noted.s(links), link_error=noted_error.s(errors))
    canvas = task | noted.s(steps) | identity.s()
    result = chord([canvas], identity.s()).delay() if in_chord else canvas.delay()
    first.drain()
    assert runs == [0, 1]
    assert redis_broker.depth() == 0
    assert (notes(links), notes(steps), notes(errors)) == (["good"], ["good"], [])
    assert result.get(timeout=5) == (["good"] if in_chord else "good")
    assert tables.count("task", "state <> 'done'") == 0


def test_hazard_11_a_fenced_out_attempt_stores_no_state_and_no_retry(
    redis_broker: Broker, backend: BarrierBackend, make_worker: MakeWorker, tables: Tables,
    hook: Hook,
) -> None:  # fmt: skip
    first, second = make_worker("first"), make_worker("second")
    runs: list[int] = []

    @hook("stall")
    def stall(task: Any, value: Any) -> str:
        runs.append(len(runs))
        if len(runs) > 1:
            return "good"
        with overtaken(backend, first, second, tables):
            task.update_state(state="PROGRESS", meta={"done": 1})
            raise task.retry(countdown=0)

    result = hooked.delay(1, "stall")
    first.drain()
    assert runs == [0, 1]
    assert (result.state, result.result) == ("SUCCESS", "good")
    assert redis_broker.depth() == 0


def test_hazard_11_a_chord_made_by_a_link_is_made_once(
    redis_broker: Broker, backend: BarrierBackend, make_worker: MakeWorker, tables: Tables,
    hook: Hook, tmp_path: Path,
) -> None:  # fmt: skip
    first, second = make_worker("first"), make_worker("second")
    path, runs = str(tmp_path / "sums"), []

    @hook("stall")
    def stall(task: Any, value: Any) -> int:
        runs.append(value)
        if len(runs) == 1:
            with overtaken(backend, first, second, tables):
                return 100
        return 1

    link = chord([add.s(1), add.s(2)], xsum.s() | noted.s(path))
    hooked.apply_async((1, "stall"), link=link)
    first.drain()
    assert runs == [1, 1]
    assert notes(path) == ["5"]
    assert tables.count("barrier") == 1


# -- 12


@pytest.mark.parametrize("task", [hooked, hooked_ignored], ids=["result", "ignored result"])
def test_hazard_12_a_retry_is_handed_over_when_the_attempt_has_ended(
    redis_broker: Broker, worker: InlineWorker, tables: Tables, hook: Hook, task: Any
) -> None:
    """While ``finally`` and context managers go on, nobody else can have the task."""
    seen: list[tuple[str, int, str]] = []

    def look(where: str, task_id: str) -> None:
        seen.append((where, redis_broker.depth(), tables.task(task_id).state))

    @hook("retry")
    def retry(task: Any, value: Any) -> str | None:
        if task.request.retries:
            return "done"

        @contextmanager
        def manager() -> Iterator[None]:
            try:
                yield
            finally:
                look("manager", task.request.id)

        try:
            with manager():
                raise task.retry(countdown=0)
        finally:
            look("finally", task.request.id)

    result = task.delay(1, "retry")
    assert worker.step() is not None
    assert seen == [("manager", 0, "running"), ("finally", 0, "running")]
    assert tables.task(result.id).state == "queued"
    assert redis_broker.depth() == 1
    worker.drain()
    assert tables.task(result.id).state == "done"
    assert redis_broker.depth() == 0


def test_hazard_12_retry_without_throw_goes_on_and_then_retries(
    redis_broker: Broker, worker: InlineWorker, tables: Tables, hook: Hook
) -> None:
    seen: list[Any] = []

    @hook("retry")
    def retry(task: Any, value: Any) -> str:
        if not task.request.retries:
            task.retry(countdown=0, throw=False)
            seen.append((redis_broker.depth(), tables.task(task.request.id).state))
            return "ignored"
        return "done"

    result = chord([hooked.s(1, "retry")], identity.s()).delay()
    worker.drain()
    assert seen == [(0, "running")]
    assert result.get(timeout=5) == ["done"]


def test_hazard_12_a_retry_that_was_swallowed_and_then_failed_is_a_failure(
    redis_broker: Broker, worker: InlineWorker, hook: Hook
) -> None:
    """The body's own end decides: an error after ``retry(throw=False)`` is its outcome."""

    @hook("retry")
    def retry(task: Any, value: Any) -> None:
        task.retry(countdown=0, throw=False)
        raise KeyError("after all")

    result = hooked.delay(1, "retry")
    assert worker.drain(most=5) == 1
    assert result.state == "FAILURE"
    assert redis_broker.depth() == 0


def test_hazard_12_an_old_copy_of_a_retried_task_is_dropped(
    app: Celery, redis_broker: Broker, worker: InlineWorker, tables: Tables, hook: Hook
) -> None:
    runs: list[int] = []

    @hook("retry")
    def retry(task: Any, value: Any) -> str:
        runs.append(task.request.retries)
        if not task.request.retries:
            raise task.retry(countdown=3600)
        return "done"

    result = hooked.delay(1, "retry")
    original = worker.take()
    worker.run(original)
    worker.run(worker.request(original.message))  # redelivered: dropped
    assert runs == [0]
    worker.drain()
    assert runs == [0, 1]
    worker.run(worker.request(original.message))
    assert runs == [0, 1]
    assert result.get(timeout=5) == "done"


# -- 13

REPLACEMENTS: dict[str, tuple[Callable[[str], Any], Any]] = {
    "task": (lambda path: noted.si(42, path), 42),
    "chain": (lambda path: noted.si(40, path) | add.s(2), 42),
    "chord": (lambda path: chord([noted.si(40, path), add.si(1, 1)], xsum.s()), 42),
    "group": (lambda path: group(noted.si(40, path), add.si(1, 1)), [40, 2]),
    "chain with a chord": (
        lambda path: chain(noted.si(20, path), group(add.s(1), add.s(1)), xsum.s()),
        42,
    ),
}


@pytest.mark.parametrize("crash", [False, True], ids=["", "messages lost"])
@pytest.mark.parametrize("member", [False, True], ids=["task", "member"])
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_hazard_13_replace_hands_its_id_on(
    redis_broker: Broker, backend: BarrierBackend, worker: InlineWorker, tables: Tables,
    tmp_path: Path, name: str, member: bool, crash: bool,
) -> None:  # fmt: skip
    """With ``crash`` every message that a step sends is lost, as when its process dies."""
    canvas, expected = REPLACEMENTS[name]
    path = str(tmp_path / "runs")
    task = replaced.s(canvas(path))
    result = chord([task, add.s(5, 5)], identity.s()).delay() if member else task.delay()
    for _ in range(20):
        if worker.step() is None:
            break
        if crash:
            lose_messages(redis_broker, backend, tables)
    assert result.get(timeout=5) == ([expected, 10] if member else expected)
    assert len(notes(path)) == 1, "the replacement ran once"
    assert tables.count("task", "state NOT IN ('done')") == 0
    assert tables.count("barrier", "state IN ('waiting', 'ready')") == 0


@pytest.mark.parametrize("member", [False, True], ids=["task", "member"])
def test_hazard_13_an_old_copy_of_a_replaced_task_is_dropped(
    worker: InlineWorker, tables: Tables, tmp_path: Path, member: bool
) -> None:
    path = str(tmp_path / "runs")
    task = replaced.s(noted.si(40, path) | add.s(2))
    result = chord([task], xsum.s()).delay() if member else task.delay()
    original = worker.take()
    worker.run(original)
    worker.run(worker.request(original.message))
    worker.drain()
    worker.run(worker.request(original.message))
    worker.drain()
    assert result.get(timeout=5) == 42
    assert notes(path) == ["40"]


@pytest.mark.filterwarnings("ignore:Exception raised outside body")
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_hazard_13_a_plain_member_may_be_replaced_too(
    worker: InlineWorker, tmp_path: Path, name: str
) -> None:
    canvas, expected = REPLACEMENTS[name]
    path = str(tmp_path / "runs")
    result = chord([plain.replaced.s(canvas(path)), add.s(5, 5)], identity.s()).delay()
    worker.drain()
    assert result.get(timeout=5) == [expected, 10]
    assert len(notes(path)) == 1


def test_hazard_13_a_fenced_out_replace_publishes_nothing(
    redis_broker: Broker, backend: BarrierBackend, make_worker: MakeWorker, tables: Tables,
    hook: Hook, tmp_path: Path,
) -> None:  # fmt: skip
    first, second = make_worker("first"), make_worker("second")
    path, runs = str(tmp_path / "runs"), []

    @hook("replace")
    def replace(task: Any, value: Any) -> int:
        runs.append(value)
        if len(runs) == 1:
            with overtaken(backend, first, second, tables):
                return task.replace(noted.si(0, path))
        return 42

    result = hooked.delay(1, "replace")
    first.drain()
    assert (runs, notes(path), redis_broker.depth()) == ([1, 1], [], 0)
    assert result.get(timeout=5) == 42
