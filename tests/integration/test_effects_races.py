"""``self.transaction()`` where runs overlap, answers are lost and transactions collide."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from celery_pgbarrier.backend import BarrierBackend
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.charges import charge
from tests.support.holding import bury
from tests.support.inline import InlineWorker, workers
from tests.support.tables import Tables
from tests.support.tasks import hooked, noted, notes
from tests.support.wire import Wire

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]
Charges = Callable[[], list[str]]
MakeWorker = Callable[..., InlineWorker]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


# -- a run that was taken for dead


@pytest.mark.parametrize("moment", ["before", "inside", "swallowed"])
def test_a_run_that_was_overtaken_is_refused(
    backend: BarrierBackend, worker: InlineWorker, make_worker: MakeWorker, tables: Tables,
    hook: Hook, charges: Charges, tmp_path: Path, moment: str,
) -> None:  # fmt: skip
    """Another run pays meanwhile; this one rolls back, sends nothing, and leaves no outcome."""
    reached: list[str] = []

    def overtake() -> None:
        bury(backend, worker, tables)
        other = threading.Thread(target=make_worker("second").drain)
        other.start()
        other.join(30)

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        name = "second" if reached else "first"
        reached.append(name)
        if name == "first" and moment == "before":
            overtake()
        try:
            with task.transaction("charge") as tx:
                reached.append(f"{name} is inside")
                charge(tx, name)
                noted.delay(name, str(tmp_path / "told"))
                tx.set(name)
                if name == "first" and moment != "before":
                    overtake()
        except Exception:
            if moment != "swallowed":
                raise
        noted.delay(name, str(tmp_path / "after"))
        return name

    result = hooked.delay(1, "charge")
    worker.step()
    worker.drain()
    assert result.get(timeout=5) == "second"
    assert charges() == ["second"]
    assert notes(tmp_path / "told") == ["second"]
    after = ["second"] if moment != "swallowed" else ["first", "second"]  # outside of any block
    assert sorted(notes(tmp_path / "after")) == after
    assert ("first is inside" in reached) == (moment != "before")
    row = tables.task(result.id)
    assert (row.state, row.status, row.attempt) == ("done", "SUCCESS", 2)


def test_threads_of_one_run_apply_a_step_once(
    worker: InlineWorker, hook: Hook, charges: Charges, tmp_path: Path
) -> None:
    """Their blocks overlap; one commits, the others are given its value."""
    count = 4

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        inside, values = threading.Barrier(count), list[Any]()
        request = task.request

        def work(number: int) -> None:
            task.request_stack.push(request)  # a new thread knows of no task
            with task.transaction("charge") as tx:
                charge(tx, str(number))
                tx.session.flush()
                inside.wait(20)
                tx.set(number)
            values.append(tx.value)

        threads = [
            threading.Thread(target=copy_context().run, args=(work, number))
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return values

    result = hooked.delay(1, "charge")
    worker.drain()
    values = result.get(timeout=5)
    assert len(values) == count
    assert charges() == [str(values[0])]
    assert len(set(values)) == 1


# -- the answer to COMMIT


@pytest.fixture(params=["psycopg2", "psycopg"])
def cut_app(
    wire: Wire, make_app: Callable[..., Celery], redis_broker: Broker, request: Any
) -> Celery:
    """An app whose line to PostgreSQL is the wire."""
    url = databases.with_driver(wire.url, request.param)
    return make_app(redis_broker, databases.backend_url(url))


@pytest.mark.parametrize("place", ["own", "users"])
def test_an_answer_to_commit_that_is_lost_is_looked_up(
    cut_app: Celery, redis_broker: Broker, wire: Wire, hook: Hook, charges: Charges,
    tmp_path: Path, place: str,
) -> None:  # fmt: skip
    engine = create_engine(wire.url, poolclass=NullPool)

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge", on=engine if place == "users" else None) as tx:
            charge(tx)
            noted.delay(1, str(tmp_path / "told"))
            tx.set("stored")
            tx.session.flush()
            wire.cut("COMMIT")
        assert wire.was_cut
        return tx.value

    with workers(cut_app, redis_broker) as make:
        result = hooked.delay(1, "charge")
        make().drain()
    assert result.get(timeout=5) == "stored"
    assert charges() == ["once"]
    assert notes(tmp_path / "told") == ["1"]


def test_a_connection_that_is_lost_before_the_commit_is_an_error(
    worker: InlineWorker, hook: Hook, charges: Charges, tables: Tables
) -> None:
    """The driver's error is raised, for the task's retry policy."""

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        try:
            with task.transaction("charge") as tx:
                charge(tx)
                tx.session.flush()
                if task.request.retries == 0:
                    tables.cut_connections()
        except Exception as error:
            raise task.retry(countdown=0, exc=error) from error
        return task.request.retries

    result = hooked.delay(1, "charge")
    worker.drain()
    assert result.get(timeout=5) == 1
    assert charges() == ["once"]


def test_a_database_that_is_away_is_waited_for_before_the_block(
    cut_app: Celery, redis_broker: Broker, wire: Wire, hook: Hook, charges: Charges
) -> None:
    mended = threading.Timer(1.0, wire.mend)

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        wire.break_off()
        mended.start()
        with task.transaction("charge") as tx:
            charge(tx)
        return "charged"

    with workers(cut_app, redis_broker) as make:
        result = hooked.delay(1, "charge")
        make().drain()
    mended.join()
    assert result.get(timeout=5) == "charged"
    assert charges() == ["once"]


# -- transactions that collide


def test_once_goes_on_after_a_deadlock(
    worker: InlineWorker, hook: Hook, tables: Tables, charges: Charges
) -> None:
    """Two runs lock the same rows in opposite order: both are paid, each once."""
    tables.ask("INSERT INTO charge (id, name) VALUES (-1, 'left'), (-2, 'right')")
    both = threading.Barrier(2)
    calls: list[int] = []
    lock = text("SELECT 1 FROM charge WHERE id = :id FOR UPDATE")

    def other(engine: Any) -> None:
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL deadlock_timeout = '10s'"))
            connection.execute(lock, {"id": -2})
            both.wait(20)
            connection.execute(lock, {"id": -1})

    def step(tx: Any, name: str, *, suffix: str) -> str:
        calls.append(len(calls))
        tx.connection.execute(lock, {"id": -1})
        if len(calls) == 1:
            both.wait(20)
        tx.connection.execute(lock, {"id": -2})
        charge(tx, name + suffix)
        return name + suffix

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        paid = task.once("charge", step, "pa", suffix="id")
        if task.request.retries == 0:
            raise task.retry(countdown=0)
        return paid

    thread = threading.Thread(target=other, args=(create_engine(tables.url, poolclass=NullPool),))
    thread.start()
    result = hooked.delay(1, "charge")
    worker.drain()
    thread.join(30)
    assert result.get(timeout=5) == "paid"
    assert calls == [0, 1]
    assert charges()[-1] == "paid"


def test_once_raises_what_does_not_pass(worker: InlineWorker, hook: Hook, charges: Charges) -> None:
    calls: list[int] = []

    def step(tx: Any) -> None:
        calls.append(1)
        charge(tx)
        tx.session.flush()
        raise ValueError("as told")

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        return task.once("charge", step)

    result = hooked.delay(1, "charge")
    worker.drain()
    with pytest.raises(ValueError, match="as told"):
        result.get(timeout=5)
    assert calls == [1]
    assert charges() == []
