"""Results and groups: what Celery's own database backend does."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, group, states
from celery.app.task import Context
from celery.exceptions import ImproperlyConfigured
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, GroupResult

from celery_pgbarrier.backend import BarrierBackend
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import add, echo, fail, hooked, identity, plain
from tests.support.wire import Wire
from tests.support.workers import environment

ROOT = Path(__file__).parents[2]
Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


@pytest.fixture(params=["psycopg2", "psycopg"])
def each_driver(
    request: pytest.FixtureRequest,
    make_app: Callable[..., Celery],
    redis_broker: Broker,
    database_url: str,
) -> Celery:
    """The app through each of the two drivers."""
    url = databases.with_driver(database_url, request.param)
    return make_app(redis_broker, databases.backend_url(url))


def request_of(task_id: str, **fields: Any) -> Context:
    return Context({"id": task_id, "task": "t", "delivery_info": {"routing_key": "q"}, **fields})


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


# -- expiry


@pytest.mark.settings(pgbarrier_batch_size=10, result_expires=60)
def test_expiry_goes_in_committed_batches(
    backend: BarrierBackend, tables: Tables, database_url: str
) -> None:
    """What one batch deleted stays deleted although a later one fails."""
    for number in range(35):
        backend.store_result(f"task-{number:02}", number, states.SUCCESS)
        backend.save_group(f"group-{number:02}", GroupResult(f"group-{number:02}", []))
    tables.expire()
    late = "UPDATE pgbarrier_task SET expires_at = expires_at + interval '.5 s' WHERE id >= "
    tables.ask(f"{late} 'task-20'")
    with in_the_way(tables, "task-25"), pytest.raises(Exception, match="refused"):
        backend.cleanup()
    assert tables.count("task") == 15
    backend.cleanup()
    assert (tables.count("task"), tables.count("group")) == (0, 0)


@contextmanager
def in_the_way(tables: Tables, task_id: str) -> Iterator[None]:
    """Let PostgreSQL refuse to delete a row."""
    tables.ask("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'refused'; END $$
    """)
    tables.ask(f"""
        CREATE TRIGGER refuse BEFORE DELETE ON pgbarrier_task FOR EACH ROW
        WHEN (OLD.id = '{task_id}') EXECUTE FUNCTION refuse()
    """)
    try:
        yield
    finally:
        tables.ask("DROP FUNCTION refuse CASCADE")


@pytest.mark.settings(result_expires=timedelta(seconds=60).total_seconds())
def test_only_what_has_expired_is_deleted(backend: BarrierBackend, tables: Tables) -> None:
    backend.store_result("old", 1, states.SUCCESS)
    tables.expire()
    backend.store_result("new", 1, states.SUCCESS)
    backend.cleanup()
    assert (tables.count("task"), backend.get_state("new")) == (1, states.SUCCESS)


@pytest.mark.parametrize(
    ("settings", "expires"),
    [
        ({"result_expires": None}, False),
        ({"result_expires": None, "pgbarrier_dedup_expires": 60}, True),
        ({"result_expires": 60}, True),
    ],
)
def test_rows_expire_where_a_setting_says_so(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str, tables: Tables,
    settings: dict[str, Any], expires: bool,
) -> None:  # fmt: skip
    app = make_app(redis_broker, databases.backend_url(database_url), **settings)
    result = add.delay(1, 1)
    InlineWorker(app, redis_broker).drain()
    assert (tables.task(result.id).expires_at is not None) is expires


def test_two_cleanups_at_once_share_the_work(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str, tables: Tables
) -> None:
    app = make_app(redis_broker, databases.backend_url(database_url), pgbarrier_batch_size=7)
    tables.ask("""
        INSERT INTO pgbarrier_task (id, state, status, expires_at)
        SELECT n::text, 'done', 'SUCCESS', clock_timestamp() - interval '1 s'
          FROM generate_series(1, 500) n
    """)
    backend, errors = app.backend, []

    def clean() -> None:
        try:
            backend.cleanup()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=clean) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert tables.count("task") == 0


# -- waiting


def test_get_waits_for_the_result(backend: BarrierBackend) -> None:
    stored = threading.Timer(0.2, lambda: backend.store_result("one", 1, states.SUCCESS))
    stored.start()
    assert AsyncResult("one").get(timeout=10) == 1
    stored.join()


def test_get_times_out(backend: BarrierBackend) -> None:
    with pytest.raises(CeleryTimeout):
        AsyncResult("nobody").get(timeout=0.05)
    with pytest.raises(CeleryTimeout):
        GroupResult("g", [AsyncResult("nobody")]).join_native(timeout=0.05)


@pytest.mark.parametrize("how", ["get", "join_native", "iter_native", "get_many"])
def test_many_results_take_one_query_a_poll(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire, how: str
) -> None:
    """300 results, of which a third is stored late: every poll is one statement on the wire."""
    app = make_app(redis_broker, databases.backend_url(wire.url))
    backend = app.backend
    ids = [f"task-{number:03}" for number in range(300)]
    store(backend, ids[:200])
    assert backend.get_state(ids[0]) == states.SUCCESS
    results = GroupResult("g", [AsyncResult(task_id) for task_id in ids])
    polls: list[int] = []
    wire.said.clear()

    def on_interval() -> None:
        polls.append(len(wire.said))
        if len(polls) == 3:
            store(backend, ids[200:])

    if how == "get_many":
        found = backend.get_many(ids, timeout=20, interval=0.02, on_interval=on_interval)
        values = {task_id: meta["result"] for task_id, meta in found}
    elif how == "iter_native":
        values = {}
        native = results.iter_native(timeout=20, interval=0.02, on_interval=on_interval)
        values.update((task_id, meta["result"]) for task_id, meta in native)
    else:
        found = getattr(results, how)(timeout=20, interval=0.02, on_interval=on_interval)
        values = dict(zip(ids, found, strict=True))
    assert values == dict(zip(ids, range(300), strict=True))
    assert polls[:3] == [1, 2, 3], wire.said


def store(backend: BarrierBackend, ids: list[str]) -> None:
    with backend.database.engine().begin() as connection:
        for task_id in ids:
            number = int(task_id.rpartition("-")[2])
            connection.exec_driver_sql(
                "INSERT INTO pgbarrier_task (id, state, status, result)"
                " VALUES (%s, 'done', 'SUCCESS', %s)",
                (task_id, backend._meta(number, states.SUCCESS, None, None)),
            )


def test_polls_are_fast_at_first_and_back_off(
    backend: BarrierBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("celery_pgbarrier.results.time.sleep", pauses.append)
    list(backend.get_many(["nobody"], interval=0.5, max_iterations=15))
    assert pauses[0] < 0.01
    assert pauses == sorted(pauses)
    assert pauses[-1] == 0.5


def test_storing_a_result_is_one_statement(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire
) -> None:
    backend = make_app(redis_broker, databases.backend_url(wire.url)).backend
    backend.store_result("warm", 1, states.SUCCESS)
    wire.said.clear()
    backend.store_result("one", 1, states.SUCCESS)
    assert len(wire.said) == 1, wire.said
    wire.said.clear()
    backend.store_result("two", {}, "PROGRESS", request=request_of("two"))
    assert len(wire.said) == 1, wire.said


# -- trouble


def test_lost_connections_are_made_again(each_driver: Celery, tables: Tables) -> None:
    backend = each_driver.backend
    backend.store_result("one", 1, states.SUCCESS)
    for call in (
        lambda: backend.store_result("two", 2, states.SUCCESS),
        lambda: backend.get_task_meta("two", cache=False),
        lambda: backend.forget("one"),
        lambda: backend.save_group("g", GroupResult("g", [])),
        lambda: backend.restore_group("g", cache=False),
        lambda: backend.cleanup(),
    ):
        assert tables.cut_connections() >= 1
        call()
    assert backend.get_task_meta("two", cache=False)["result"] == 2


def test_a_backend_can_be_pickled(backend: BarrierBackend) -> None:
    backend.store_result("one", 1, states.SUCCESS)
    again = pickle.loads(pickle.dumps(backend))
    assert again.get_result("one") == 1


def test_sqlalchemy_options_are_taken(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str
) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    app = make_app(
        redis_broker, databases.backend_url(database_url), database_engine_options=options
    )
    pool = app.backend.database.engine().pool
    assert (pool.size(), pool._max_overflow) == (1, 0)


def test_one_connection_serves_many_threads(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str, tables: Tables
) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 10}
    app = make_app(
        redis_broker, databases.backend_url(database_url), database_engine_options=options
    )
    backend, errors = app.backend, []

    def work(number: int) -> None:
        try:
            for step in range(5):
                backend.store_result(f"{number}-{step}", step, states.SUCCESS)
                assert backend.get_result(f"{number}-{step}") == step
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    assert tables.value(f"SELECT count(*) FROM pg_stat_activity WHERE {others}") == 1


FORK = """
import os, sys
from tests.support.app import app

backend = app.backend
backend.store_result("parent", 1, "SUCCESS")
pid_of = "SELECT pg_backend_pid()"
with backend.database.engine().connect() as connection:
    mine = connection.exec_driver_sql(pid_of).scalar()
children = []
for number in range(3):
    child = os.fork()
    if child == 0:
        try:
            for step in range(20):
                backend.store_result(f"{number}-{step}", step, "SUCCESS")
                assert backend.get_task_meta(f"{number}-{step}", cache=False)["result"] == step
            with backend.database.engine().connect() as connection:
                assert connection.exec_driver_sql(pid_of).scalar() != mine
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    children.append(child)
for step in range(20):
    backend.store_result(f"parent-{step}", step, "SUCCESS")
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
with backend.database.engine().connect() as connection:
    assert connection.exec_driver_sql(pid_of).scalar() == mine
sys.exit(sum(codes))
"""


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_children_of_a_fork_do_not_use_their_parents_connections(
    redis_broker: Broker, database_url: str, tables: Tables, driver: str
) -> None:
    """With a pool of one connection each; the parent goes on with its own."""
    url = databases.backend_url(databases.with_driver(database_url, driver))
    options = {"database_engine_options": {"pool_size": 1, "max_overflow": 0}}
    env = {**os.environ, **environment(redis_broker, url, options)}
    done = subprocess.run(
        [sys.executable, "-c", FORK], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert tables.count("task", "status = 'SUCCESS'") == 1 + 4 * 20
