"""Expiry, waiting for results, connections: what a result backend does beside results."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, states
from celery.app.task import Context
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, GroupResult
from sqlalchemy.pool import NullPool

from celery_pgbarrier import reaper
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.store.database import Database
from celery_pgbarrier.store.url import parse_url
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import add
from tests.support.waiting import wait_until
from tests.support.wire import Wire
from tests.support.workers import environment

ROOT = Path(__file__).parents[2]
Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


def request_of(task_id: str, **fields: Any) -> Context:
    return Context({"id": task_id, "task": "t", "delivery_info": {"routing_key": "q"}, **fields})


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
    assert tables.count("task") == 35 - 10  # the second batch is twice as large, and fails
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


def test_threads_that_wait_share_their_polls(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire
) -> None:
    """Each of 60 threads asks once by itself; then one of them asks for all."""
    app = make_app(redis_broker, databases.backend_url(wire.url))
    app.backend.get_state("warm")
    wire.said.clear()
    with ThreadPoolExecutor(60) as pool:
        waits = [pool.submit(waits_in_vain, app, f"nobody-{n}", 1.0) for n in range(60)]
        assert all(wait.result(timeout=60) for wait in waits)
    shared = [said for said in wire.said if said.count("nobody-") > 1]
    assert max(said.count("nobody-") for said in shared) > 30
    assert len(wire.said) < 60 * 10, "a thread alone asks 40 times in a second"


def waits_in_vain(app: Celery, task_id: str, timeout: float) -> bool:
    with pytest.raises(CeleryTimeout):
        app.AsyncResult(task_id).get(timeout=timeout)
    return True


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
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 10,
               "connect_args": {"application_name": "counted"}}  # fmt: skip
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
    counted = "datname = current_database() AND application_name = 'counted'"
    assert tables.value(f"SELECT count(*) FROM pg_stat_activity WHERE {counted}") == 1


def test_a_thread_that_waits_for_a_connection_gets_the_next_one(database_url: str) -> None:
    """The one that a thread keeps for its next statement is not kept from others."""
    options = {"pool_size": 1, "max_overflow": 1, "pool_timeout": 60}
    database = Database(parse_url(database_url), engine_options=options)
    gates = [threading.Event(), threading.Event()]
    begun = threading.Barrier(3)
    answers: list[Any] = []

    def hold(gate: threading.Event) -> None:
        database.transaction(lambda connection: (begun.wait(30), gate.wait(30)))

    database.statement("SELECT 1", {})
    holders = [threading.Thread(target=hold, args=(gate,)) for gate in gates]
    for holder in holders:
        holder.start()
    begun.wait(30)
    waiter = threading.Thread(
        target=lambda: answers.extend(database.statement("SELECT 2 AS value", {}))
    )
    waiter.start()
    pool: Any = database.engine().pool
    wait_until(lambda: pool._pool.not_empty._waiters, 10, "the third thread waits in the pool")
    gates[0].set()
    waiter.join(10)
    assert [row.value for row in answers] == [2]
    gates[1].set()
    for thread in (*holders, waiter):
        thread.join(10)
    assert pool.checkedout() <= 1
    database.dispose()
    assert pool.checkedout() == 0


@pytest.mark.parametrize(
    "options",
    [{"poolclass": NullPool}, {"pool_pre_ping": True}, {"pool_size": 1, "max_overflow": 0}],
)
def test_no_connection_is_kept_from_a_pool_that_looks_after_each(
    database_url: str, options: dict[str, Any]
) -> None:
    database = Database(parse_url(database_url), engine_options=options)
    out: list[int] = []
    for event, change in (("checkout", 1), ("checkin", -1)):
        sa.event.listen(database.engine(), event, lambda *_, change=change: out.append(change))
    for _ in range(2):
        database.statement("SELECT 1", {})
        database.transaction(lambda connection: connection.exec_driver_sql("SELECT 1"))
    assert out[-4:] == [1, -1, 1, -1]
    assert sum(out) == 0
    database.dispose()


def test_a_kept_connection_goes_back_to_be_looked_at(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool recycles old ones when it gives them."""
    database = Database(parse_url(database_url))
    out: list[int] = []
    sa.event.listen(database.engine(), "checkout", lambda *_: out.append(1))
    database.statement("SELECT 1", {})
    first = len(out)
    database.statement("SELECT 1", {})
    assert len(out) == first, "kept"
    monkeypatch.setattr("celery_pgbarrier.store.database._KEEP", 0.0)
    database.statement("SELECT 1", {})
    assert len(out) == first + 1
    database.dispose()


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


def test_many_small_chords_go_in_few_transactions(backend: BarrierBackend, tables: Tables) -> None:
    """A pass has a bounded number of batches: one chord a batch would let finished ones pile up."""
    tables.ask("""
        INSERT INTO pgbarrier_barrier (id, call, size, open_slots, state, body, expires_at)
        SELECT 'chord-' || n, gen_random_uuid(), 2, 0, 'released', '', now() - interval '1 day'
          FROM generate_series(1, 300) AS n
    """)
    tables.ask("""
        INSERT INTO pgbarrier_task (id, state, barrier_id, slot, position)
        SELECT 'member-' || n || '-' || k, 'done', 'chord-' || n, 0, k
          FROM generate_series(1, 300) AS n, generate_series(1, 2) AS k
    """)
    assert reaper.purge(backend, batches=2) == 900
    assert tables.count("barrier") == tables.count("task") == 0
