"""What nobody should send, and what comes of it: no chord is lost, nothing runs twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord, signature
from celery.exceptions import NotRegistered

from celery_pgbarrier import reaper
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.errors import DispatchConflict
from tests.support import databases
from tests.support.app import FAST_RECOVERY
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import (
    add,
    echo,
    hooked,
    identity,
    noted,
    noted_error,
    notes,
    plain,
    replaced,
    unserializable,
    xsum,
)
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]


def foreign(app: Celery, broker: Broker, task_id: str, *args: Any) -> None:
    """Send a message as another program would: without a stamp."""
    message = app.amqp.create_task_message(task_id, "test.noted", args, {})
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            message.body, routing_key=broker.queue, headers=message.headers,
            serializer="json", **message.properties,
        )  # fmt: skip


# -- unknown ids


def test_a_message_whose_id_the_table_does_not_know_is_run(
    worker: InlineWorker, tables: Tables
) -> None:
    result = add.delay(1, 1)
    assert tables.count("task") == 0
    worker.drain()
    assert result.get(timeout=5) == 2


def test_a_foreign_message_is_run_once_by_its_id(
    app: Celery, redis_broker: Broker, worker: InlineWorker, tables: Tables, tmp_path: Path
) -> None:
    path = str(tmp_path / "runs")
    for _ in range(3):
        foreign(app, redis_broker, "foreign-1", 7, path)
    foreign(app, redis_broker, "foreign-2", 8, path)
    assert worker.drain() == 4
    assert notes(path) == ["7", "8"]
    assert app.AsyncResult("foreign-1").get(timeout=5) == 7


def test_a_user_chosen_id_may_be_called_again(worker: InlineWorker, tmp_path: Path) -> None:
    """A new call of a finished id is a new run; a copy of the call that has run last is not."""
    path = str(tmp_path / "runs")
    noted.apply_async((1, path), task_id="sync-42")
    first = worker.take()
    worker.run(first)
    worker.run(worker.request(first.message))
    result = noted.apply_async((2, path), task_id="sync-42")
    second = worker.take()
    worker.run(second)
    worker.run(worker.request(second.message))
    assert notes(path) == ["1", "2"]
    assert result.get(timeout=5) == 2


def test_a_recorded_message_whose_row_was_purged_is_dropped(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, tmp_path: Path
) -> None:
    """A copy of a member arrives after its chord has been purged."""
    path = str(tmp_path / "runs")
    result = chord([noted.s(1, path), plain.noted.s(2, path)], xsum.s()).delay()
    copies = worker.take_all()
    for copy in copies:
        worker.run(copy)
    body = worker.take()
    worker.run(body)
    assert result.get(timeout=5) == 3
    tables.expire()
    backend.cleanup()
    assert (tables.count("task"), tables.count("barrier"), tables.count("slot")) == (0, 0, 0)
    worker.run(worker.request(copies[0].message))
    worker.run(worker.request(body.message))
    assert notes(path) == ["1", "2"]
    assert (tables.count("task"), tables.count("barrier")) == (0, 0)


def test_a_copy_of_a_plain_member_that_was_purged_counts_nothing(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    """A plain task does run again, as in Celery; no chord is touched by it."""
    chord([plain.add.s(1, 1)], xsum.s()).delay()
    copy = worker.take()
    worker.run(copy)
    worker.drain()
    tables.expire()
    backend.cleanup()
    worker.run(worker.request(copy.message))
    assert worker.drain() == 0
    assert tables.count("barrier") == 0


# -- results that cannot be stored


@pytest.mark.parametrize("kind", [unserializable, plain.unserializable], ids=["claimed", "plain"])
def test_a_result_that_the_serializer_refuses_fails_the_task_and_its_chord(
    worker: InlineWorker, tables: Tables, tmp_path: Path, kind: Any
) -> None:
    errors = str(tmp_path / "errors")
    body = xsum.s().set(link_error=[noted_error.s(errors)])
    result = chord([kind.s(), add.s(1, 1)], body).delay()
    member = result.parent.results[0]
    worker.drain()
    assert member.state == "FAILURE"
    assert "Encod" in type(member.result).__name__ or "serializable" in str(member.result)
    assert result.state == "FAILURE"
    assert notes(errors) == [result.id]
    assert tables.count("task", "state <> 'done'") == 0


def test_a_body_whose_result_is_refused_fails(worker: InlineWorker, tables: Tables) -> None:
    result = chord([add.s(1, 1)], unserializable.si() | identity.s()).delay()
    worker.drain()
    assert result.state == "FAILURE"
    assert tables.count("task", "status = 'FAILURE'") == 2
    assert tables.count("task", "state <> 'done'") == 0


def test_an_error_that_cannot_be_serialized_is_still_an_error(
    worker: InlineWorker, hook: Hook
) -> None:
    class Odd(Exception):
        def __init__(self, value: object) -> None:
            super().__init__(value, object())

    @hook("odd")
    def odd(task: Any, value: Any) -> None:
        raise Odd(value)

    result = chord([hooked.s(1, "odd"), add.s(1, 1)], xsum.s()).delay()
    worker.drain()
    assert result.parent.results[0].state == "FAILURE"
    assert result.state == "FAILURE"


def test_arguments_that_the_serializer_refuses_leave_nothing(
    app: Celery, redis_broker: Broker, tables: Tables
) -> None:
    """G2: the call raises, no row is there, nothing was published."""
    assert app.backend is not None
    with pytest.raises(Exception, match="serializable"):
        chord([add.s(1, 1), echo.s(object())], xsum.s()).delay()
    assert (tables.count("task"), tables.count("barrier"), redis_broker.depth()) == (0, 0, 0)


def test_a_generator_that_raises_leaves_nothing(
    app: Celery, redis_broker: Broker, tables: Tables
) -> None:
    def header() -> Any:
        yield add.s(1, 1)
        yield add.s(2, 2)
        raise LookupError("in the header")

    assert app.backend is not None
    with pytest.raises(LookupError, match="in the header"):
        chord(header(), xsum.s()).delay()
    assert (tables.count("task"), tables.count("barrier"), redis_broker.depth()) == (0, 0, 0)


# -- ids that are used twice


def test_a_frozen_chord_that_still_runs_is_not_started_again(
    worker: InlineWorker, tables: Tables, redis_broker: Broker
) -> None:
    canvas = chord([add.s(1, 1).set(task_id="one"), add.s(2, 2)], xsum.s())
    result = canvas.delay()
    depth = redis_broker.depth()
    with pytest.raises(DispatchConflict, match="one"):
        chord([add.s(5, 5).set(task_id="one")], xsum.s()).delay()
    assert redis_broker.depth() == depth
    worker.drain()
    assert result.get(timeout=5) == 6
    assert tables.count("barrier") == 1


def test_a_chord_with_ids_of_a_finished_one_is_a_new_run(worker: InlineWorker) -> None:
    def start(value: int) -> Any:
        members = [add.s(value, value).set(task_id="one"), add.s(1, 1).set(task_id="two")]
        return chord(members, xsum.s().set(task_id="body")).delay()

    first = start(1)
    worker.drain()
    assert first.get(timeout=5) == 4
    first.backend._cache.clear()
    second = start(10)
    worker.drain()
    assert second.get(timeout=5) == 22


@pytest.mark.filterwarnings("ignore:Exception raised outside body")
def test_a_link_that_takes_an_id_that_is_in_use_does_not_run_the_task_for_ever(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, redis_broker: Broker
) -> None:
    """What an outcome leads to cannot be recorded: that is an error of the task, said once."""
    chord([add.s(1, 1).set(task_id="taken")], xsum.s()).delay()
    redis_broker.purge()
    result = add.apply_async((1, 1), link=add.s(1).set(task_id="taken"))
    worker.drain()
    assert result.state in ("SUCCESS", "FAILURE")
    assert tables.task(result.id).state == "done"


# -- tasks that are not registered


@pytest.mark.slow
def test_tasks_that_no_worker_knows(
    database_url: str, redis_broker: Broker, make_app: Callable[..., Celery],
    start_worker: Callable[..., WorkerProcess], tables: Tables, tmp_path: Path,
) -> None:  # fmt: skip
    """A body, a member, the head of a chain and a replacement: each fails, and so does its chord.

    The message of a body is recorded; a worker that does not know it fails it with NotRegistered.
    """
    url = databases.backend_url(database_url)
    app = make_app(redis_broker, url, **FAST_RECOVERY)
    errors = [str(tmp_path / f"errors-{number}") for number in range(3)]
    nobody = signature("nobody.knows", app=app)
    bodies = [xsum.s().set(link_error=[noted_error.s(path)]) for path in errors]
    results = {
        "body": chord([add.s(1, 1)], nobody.clone()).delay(),
        "member": chord([nobody.clone(), add.s(1, 1)], bodies[0]).delay(),
        "head": chord([nobody.clone() | add.s(1), add.s(1, 1)], bodies[1]).delay(),
        "replacement": chord([replaced.s(nobody.clone()), add.s(1, 1)], bodies[2]).delay(),
    }
    worker = start_worker(redis_broker, url, settings=FAST_RECOVERY, concurrency=2)
    for name, result in results.items():
        wait_until(
            lambda result=result: result.state == "FAILURE", 30,
            lambda name=name: f"{name} fails; {tables.ask('SELECT * FROM pgbarrier_task')}",
        )  # fmt: skip
    assert isinstance(results["body"].result, NotRegistered)
    for name in ("member", "head", "replacement"):
        assert "never registered" in str(results[name].result)
    ids = [results[name].id for name in ("member", "head", "replacement")]
    wait_until(lambda: [notes(path) for path in errors] == [[i] for i in ids], 30)
    assert tables.count("task", "state <> 'done'") == 0
    assert worker.running


# -- the reaper


def test_a_row_that_cannot_be_settled_does_not_stop_the_pass(
    app: Celery, backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    """One message is rubbish: the others are published all the same."""
    bad = chord([add.s(1, 1)], xsum.s()).delay()
    good = chord([add.s(2, 2)], xsum.s()).delay()
    worker.broker.purge()
    tables.ask(
        "UPDATE pgbarrier_task SET message = 'rubbish' WHERE id = :id",
        id=bad.parent.results[0].id,
    )
    tables.ask("UPDATE pgbarrier_task SET published_at = NULL WHERE due_at IS NOT NULL")
    tables.overdue()
    reaper.run_once(backend)
    worker.drain()
    assert good.get(timeout=5) == 4


def test_a_worker_whose_database_refuses_it_does_not_start(
    start_worker: Callable[..., WorkerProcess], redis_broker: Broker, database_url: str
) -> None:
    """It would take messages and could keep none of them."""
    url = databases.backend_url(databases.sibling(database_url, "no_such_database"))
    worker = start_worker(redis_broker, url, ready=False)
    assert worker.process.wait(60) != 0
    assert 'database "no_such_database" does not exist' in worker.log()
    assert " ready." not in worker.log()
