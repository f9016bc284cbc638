"""Results and groups: what Celery's own database backend does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, group, states
from celery.exceptions import ImproperlyConfigured
from celery.result import AsyncResult, GroupResult

from celery_pgbarrier.backend import BarrierBackend
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import add, echo, fail, hooked, identity, plain

ROOT = Path(__file__).parents[2]
Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


# -- results


@pytest.mark.parametrize(
    "value",
    [None, 0, False, "", "text \N{SNOWMAN}", 1.5, [1, [2]], {"a": {"b": None}}, "x" * 1_000_000],
    ids=lambda value: repr(value)[:20],
)
def test_values_come_back(each_driver: Celery, value: Any) -> None:
    backend = each_driver.backend
    backend.store_result("one", value, states.SUCCESS)
    assert AsyncResult("one").get(timeout=5) == value
    assert backend.get_task_meta("one", cache=False)["result"] == value


def test_unknown_tasks_are_pending(backend: BarrierBackend) -> None:
    result = AsyncResult("nobody")
    assert (result.state, result.result) == (states.PENDING, None)
    assert backend.get_task_meta("nobody")["task_id"] == "nobody"


def test_a_whole_run(each_driver: Celery, redis_broker: Broker) -> None:
    worker = InlineWorker(each_driver, redis_broker)
    result, failed = add.delay(2, 3), fail.delay("no")
    assert worker.drain() == 2
    assert result.get(timeout=5) == 5
    assert isinstance(result.date_done, datetime)
    with pytest.raises(ValueError, match="no"):
        failed.get(timeout=5)
    assert "ValueError: no" in failed.traceback


@pytest.mark.parametrize("kind", [identity, plain.identity], ids=["claimed", "plain"])
@pytest.mark.settings(task_track_started=True)
def test_started_is_tracked(worker: InlineWorker, tables: Tables, hook: Hook, kind: Any) -> None:
    seen: list[tuple[str, Any]] = []

    @hook("look")
    def look(task: Any, value: Any) -> None:
        meta = AsyncResult(task.request.id)._get_task_meta()
        seen.append((meta["status"], meta["result"]["pid"]))

    (hooked if kind is identity else plain.hooked).delay(1, "look")
    worker.drain()
    assert [state for state, _ in seen] == [states.STARTED]


@pytest.mark.parametrize("kind", [hooked, plain.hooked], ids=["claimed", "plain"])
def test_custom_states(worker: InlineWorker, hook: Hook, kind: Any) -> None:
    seen: list[Any] = []

    @hook("progress")
    def progress(task: Any, value: Any) -> None:
        for done in (1, 2):
            task.update_state(state="PROGRESS", meta={"done": done})
            result = AsyncResult(task.request.id)
            seen.append((result.state, result.info))

    result = kind.delay(1, "progress")
    worker.drain()
    assert seen == [("PROGRESS", {"done": 1}), ("PROGRESS", {"done": 2})]
    assert result.get(timeout=5) == 1


def test_a_state_does_not_overwrite_a_success(backend: BarrierBackend) -> None:
    backend.store_result("one", 1, states.SUCCESS)
    for state, value in (("PROGRESS", {}), (states.STARTED, {}), (states.FAILURE, ValueError())):
        backend.store_result("one", value, state)
    assert backend.get_task_meta("one", cache=False)["status"] == states.SUCCESS


def test_exceptions_keep_type_message_and_traceback(backend: BarrierBackend) -> None:
    backend.store_result("one", KeyError("missing"), states.FAILURE, traceback="where")
    meta = backend.get_task_meta("one")
    assert (type(meta["result"]), meta["result"].args) == (KeyError, ("missing",))
    assert meta["traceback"] == "where"


def test_forget(backend: BarrierBackend, worker: InlineWorker) -> None:
    result = add.delay(1, 1)
    original = worker.take()
    worker.run(original)
    assert result.get(timeout=5) == 2
    result.forget()
    assert AsyncResult(result.id).state == states.PENDING
    worker.run(worker.request(original.message))  # a late copy is still recognised
    assert AsyncResult(result.id).state == states.PENDING


def test_ignored_results_are_not_shown(worker: InlineWorker, tables: Tables) -> None:
    result = add.apply_async((1, 1), ignore_result=True)
    worker.drain()
    assert AsyncResult(result.id).state == states.PENDING


@pytest.mark.settings(result_extended=True)
@pytest.mark.parametrize("kind", [echo, plain.echo], ids=["claimed", "plain"])
def test_extended_metadata(worker: InlineWorker, redis_broker: Broker, kind: Any) -> None:
    result = kind.delay(1, two=2)
    worker.drain()
    assert result.get(timeout=5) == {"args": [1], "kwargs": {"two": 2}}
    assert (result.name, result.args, result.kwargs) == (kind.name, [1], {"two": 2})
    assert (result.retries, result.queue) == (0, redis_broker.queue)
    assert result.worker


@pytest.mark.settings(result_extended=True)
@pytest.mark.parametrize("kind", [echo, plain.echo], ids=["claimed", "plain"])
def test_stamps_are_kept(worker: InlineWorker, kind: Any) -> None:
    signature = kind.s(1)
    signature.stamp(customer="c1")
    result = signature.delay()
    worker.drain()
    meta = result._get_task_meta()
    assert meta["stamped_headers"] == ["customer"]
    assert meta["customer"] in ("c1", ["c1"])


def test_children(worker: InlineWorker, hook: Hook) -> None:
    """Those sent in the body and those sent by links, in the order of their calls."""
    sent: list[str] = []

    @hook("parent")
    def parent(task: Any, value: Any) -> None:
        sent.append(add.delay(1, 1).id)

    link = identity.s().set(task_id="a-link")
    result = hooked.apply_async((1, "parent"), link=link)
    worker.drain()
    assert [child.id for child in result.children] == [*sent, "a-link"]
    assert [value for _, value in result.collect()] == [1, 2, 1]


def test_parents_and_groups_are_in_the_meta(worker: InlineWorker) -> None:
    result = group(add.s(1, 1), add.s(2, 2)).delay()
    worker.drain()
    assert {r._get_task_meta()["group_id"] for r in result.results} == {result.id}


# -- serializers


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml"])
@pytest.mark.parametrize("compression", [None, "gzip", "bzip2"])
def test_serializers_and_compression(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str, tables: Tables,
    serializer: str, compression: str | None,
) -> None:  # fmt: skip
    app = make_app(
        redis_broker,
        databases.backend_url(database_url),
        result_serializer=serializer,
        result_compression=compression,
        accept_content=["json", serializer],
    )
    worker = InlineWorker(app, redis_broker)
    value = {"text": "x" * 10_000, "list": [1, 2.5, None]}
    result, failed = identity.delay(value), fail.delay("as told")
    grouped = group(add.s(1, 1), add.s(2, 2)).delay()
    grouped.save()
    worker.drain()
    assert result.get(timeout=5) == value
    assert isinstance(failed.get(timeout=5, propagate=False), ValueError)
    assert GroupResult.restore(grouped.id).get(timeout=5) == [2, 4]
    stored = len(bytes(tables.task(result.id).result))
    assert (stored < 1000) is (compression is not None)


def test_pickled_objects(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str
) -> None:
    app = make_app(
        redis_broker, databases.backend_url(database_url), result_serializer="pickle",
        accept_content=["json", "pickle"],
    )  # fmt: skip
    app.backend.store_result("one", {1, 2}, states.SUCCESS)
    assert AsyncResult("one").get(timeout=5) == {1, 2}
    app.backend.store_result("two", ValueError("no", 1), states.FAILURE)
    assert AsyncResult("two").result.args == ("no", 1)


def test_unknown_compression_is_refused(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str
) -> None:
    app = make_app(redis_broker, databases.backend_url(database_url), result_compression="melt")
    with pytest.raises(ImproperlyConfigured, match="melt"):
        _ = app.backend


# -- groups


def test_groups_are_saved_restored_and_deleted(worker: InlineWorker) -> None:
    result = group(add.s(n, n) for n in range(3)).delay()
    result.save()
    worker.drain()
    restored = GroupResult.restore(result.id)
    assert [child.id for child in restored.results] == [child.id for child in result.results]
    assert restored.get(timeout=5) == [0, 2, 4]
    assert GroupResult.restore("nobody") is None
    result.delete()
    assert GroupResult.restore(result.id) is None


def test_groups_are_forgotten_with_their_results(worker: InlineWorker) -> None:
    result = group(add.s(n, n) for n in range(3)).delay()
    result.save()
    worker.drain()
    result.forget()
    assert {AsyncResult(child.id).state for child in result.results} == {states.PENDING}


def test_a_group_may_be_saved_twice(backend: BarrierBackend) -> None:
    result = GroupResult("g", [AsyncResult("a")])
    result.save()
    GroupResult("g", [AsyncResult("a"), AsyncResult("b")]).save()
    assert [child.id for child in GroupResult.restore("g").results] == ["a", "b"]
