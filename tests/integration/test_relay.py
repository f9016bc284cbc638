"""Orphan 2: what the broker forgot is published again, what only waits is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, chord
from celery.worker import state
from kombu.transport import virtual

from celery_pgbarrier import MessageRefused, NeverClaimed, poison, queues, reaper, worker
from celery_pgbarrier.backend import BarrierBackend
from tests.support import databases
from tests.support.brokers import Broker, private_broker
from tests.support.inline import InlineWorker, workers
from tests.support.tables import Tables
from tests.support.tasks import add, xsum
from tests.support.waiting import wait_until

SIZE = 20
EARLY = 31  # seconds, just above the default of pgbarrier_empty_after


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


def pass_time(tables: Tables, seconds: float) -> None:
    """Let time pass for every message that waits."""
    tables.ask(
        "UPDATE pgbarrier_task SET due_at = due_at - make_interval(secs => :s),"
        " published_at = published_at - make_interval(secs => :s) WHERE due_at IS NOT NULL",
        s=seconds,
    )


def drop_queue(broker: Broker) -> None:
    """Lose the queue itself."""
    with broker.connection() as connection, connection.channel() as channel:
        if isinstance(channel, virtual.Channel):
            channel.queue_purge(broker.queue)
        else:
            channel.queue_delete(broker.queue)


@pytest.mark.parametrize("lose", [Broker.purge, drop_queue], ids=["empty", "gone"])
def test_what_a_queue_lost_is_published_without_the_back_off(
    make_app: Callable[..., Celery], each_broker: Broker, database_url: str, tables: Tables,
    lose: Callable[[Broker], Any],
) -> None:  # fmt: skip
    """All of it in the first pass after pgbarrier_empty_after, and not again in the next."""
    app = make_app(each_broker, databases.backend_url(database_url))
    result = chord([add.s(n, n) for n in range(SIZE)], xsum.s()).delay()
    wait_until(lambda: each_broker.depth() == SIZE)  # RabbitMQ confirms nothing here
    lose(each_broker)
    assert reaper.run_once(app.backend).messages_published == 0, "it may just have been taken"
    pass_time(tables, EARLY)
    assert reaper.run_once(app.backend).messages_published == SIZE
    wait_until(lambda: each_broker.depth() == SIZE)
    each_broker.purge()
    pass_time(tables, EARLY)
    assert reaper.run_once(app.backend).messages_published == 0, "the wait is doubled each time"
    pass_time(tables, EARLY)
    assert reaper.run_once(app.backend).messages_published == SIZE
    with workers(app, each_broker) as make:
        inline = make()
        wait_until(lambda: inline.drain() == 0 and result.ready())
    assert result.get(timeout=10) == SIZE * (SIZE - 1)


def test_a_queue_that_holds_messages_has_lost_none_yet(
    backend: BarrierBackend, redis_broker: Broker, tables: Tables
) -> None:
    chord([add.s(n, n) for n in range(SIZE)], xsum.s()).delay()
    pass_time(tables, EARLY)
    assert reaper.run_once(backend).messages_published == 0
    assert redis_broker.depth() == SIZE


@pytest.mark.rabbitmq
def test_a_message_that_the_broker_refuses_does_not_hold_up_the_others(
    make_app: Callable[..., Celery], rabbitmq_broker: Broker, database_url: str, tables: Tables
) -> None:
    """AMQP has one byte for a priority; what is due is published in batches of two."""
    url = databases.backend_url(database_url)
    app = make_app(rabbitmq_broker, url, pgbarrier_batch_size=2)
    chord([add.s(n, n).set(priority=None if n else 1000) for n in range(SIZE)], xsum.s()).delay()
    wait_until(lambda: rabbitmq_broker.depth() == SIZE - 1)
    rabbitmq_broker.purge()
    tables.ask(
        "UPDATE pgbarrier_task SET published_at = NULL, publications = 0,"
        " due_at = clock_timestamp() - make_interval(secs => 60 - position)"
    )
    assert reaper.run_once(app.backend).messages_published == SIZE - 1
    wait_until(lambda: rabbitmq_broker.depth() == SIZE - 1)
    refused = "SELECT position, publications FROM pgbarrier_task WHERE published_at IS NULL"
    assert [tuple(row) for row in tables.ask(refused)] == [(0, 1)]


@pytest.mark.rabbitmq
def test_what_the_broker_always_refuses_is_given_up(
    make_app: Callable[..., Celery], rabbitmq_broker: Broker, database_url: str, tables: Tables
) -> None:
    """At doubling intervals, and not for ever: the chord fails, its message is kept."""
    app = make_app(rabbitmq_broker, databases.backend_url(database_url))
    result = chord([add.s(0, 0).set(priority=1000)], xsum.s()).delay()
    member = result.parent.results[0].id
    waits = []
    for _ in range(10):
        tables.overdue()
        assert reaper.run_once(app.backend).messages_published == 0
        due = "SELECT extract(epoch FROM due_at - clock_timestamp()) FROM pgbarrier_task"
        waits.append(float(tables.value(f"{due} WHERE id = :id", id=member)))
    assert [round(wait / 15) for wait in waits] == [2**n for n in range(10)]
    assert app.AsyncResult(member).state == "PENDING"
    tables.overdue()
    reaper.run_once(app.backend)
    with pytest.raises(MessageRefused, match="refused the message of"):
        app.AsyncResult(member).get(timeout=5)
    assert result.state == "FAILURE"
    assert [row.id for row in poison.listed(app.backend)] == [member]


def test_a_broker_that_is_away_refuses_nothing(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str, tables: Tables
) -> None:
    """However often: its messages are published when it is back."""
    url = databases.backend_url(database_url)
    away = make_app(private_broker("redis://127.0.0.1:1/0"), url)
    here = make_app(redis_broker, url)
    result = chord([add.s(1, 1)], xsum.s()).delay()
    member = result.parent.results[0].id
    tables.ask("UPDATE pgbarrier_task SET published_at = NULL, publications = 9 WHERE id = :id",
               id=member)  # fmt: skip
    for _ in range(3):
        tables.overdue()
        assert reaper.run_once(away.backend).messages_published == 0
        assert tables.task(member).publications == 9
    tables.overdue()
    assert reaper.run_once(here.backend).messages_published == 1
    assert tables.task(member).state == "queued"


def test_a_message_with_an_eta_is_lost_after_that_only(
    backend: BarrierBackend, redis_broker: Broker, tables: Tables
) -> None:
    """Workers take it out of the queue long before."""
    add.apply_async((1, 1), countdown=3600)
    chord([add.s(1, 1).set(countdown=3600)], xsum.s()).delay()
    redis_broker.purge()
    pass_time(tables, EARLY)
    assert reaper.run_once(backend).messages_published == 0
    pass_time(tables, 3600)
    assert reaper.run_once(backend).messages_published == 1


def test_what_a_worker_holds_is_not_lost(
    backend: BarrierBackend, redis_broker: Broker, tables: Tables, worker: InlineWorker
) -> None:
    """It waits for a free process of that worker: it says so at each beat, from the second on."""
    result = chord([add.s(n, n) for n in range(SIZE)], xsum.s()).delay()
    held = worker.take_all()
    for request in held:
        state.task_reserved(request)
    seen = hold(backend, worker, set())
    for _ in range(20):
        pass_time(tables, EARLY - 2)
        assert hold(backend, worker, seen) == seen
        assert reaper.run_once(backend).messages_published == 0
    for request in held:
        worker.run(request)
    worker.drain()
    assert result.get(timeout=10) == SIZE * (SIZE - 1)
    assert hold(backend, worker, seen) == set()


def test_what_a_dead_worker_held_is_lost(
    backend: BarrierBackend, redis_broker: Broker, tables: Tables, worker: InlineWorker
) -> None:
    chord([add.s(n, n) for n in range(SIZE)], xsum.s()).delay()
    for request in worker.take_all():
        state.task_reserved(request)
    hold(backend, worker, hold(backend, worker, set()))
    state.reset_state()
    pass_time(tables, EARLY)
    assert reaper.run_once(backend).messages_published == SIZE


def hold(backend: BarrierBackend, of: InlineWorker, before: set[Any]) -> set[Any]:
    with of.identity():
        return worker.hold(backend, before)


def test_hazard_23_what_is_taken_again_and_again_is_given_up(
    app: Celery, backend: BarrierBackend, redis_broker: Broker, tables: Tables, worker: InlineWorker
) -> None:
    """Its copies vanish while younger messages of the queue are run: it fails, and so its chord."""
    result = chord([add.s(1, 1), add.s(2, 2)], xsum.s()).delay()
    bad = result.parent.results[0].id
    published = 1
    for _ in range(40):
        for request in worker.take_all():
            if request.id != bad:
                worker.run(request)
        if app.AsyncResult(bad).ready():
            break
        later = chord([add.s(3, 3)], xsum.s()).delay()
        tables.ask("UPDATE pgbarrier_task SET due_at = 'epoch' WHERE id = :id", id=bad)
        running(tables, later.parent.results[0].id)
        published += reaper.run_once(backend).messages_published
        tables.ask("UPDATE pgbarrier_task SET state = 'queued', worker = NULL"
                   " WHERE state = 'running'")  # fmt: skip
    assert isinstance(app.AsyncResult(bad).result, NeverClaimed)
    assert published == 11
    worker.drain()
    assert result.state == "FAILURE"
    assert [row.id for row in poison.listed(backend)] == [bad]


def running(tables: Tables, task_id: str) -> None:
    """Let a task run in a live worker, as evidence that its queue moves."""
    tables.ask("INSERT INTO pgbarrier_worker (id, name, state) VALUES"
               " ('00000000-0000-4000-8000-000000000001', 'alive', 'running')"
               " ON CONFLICT DO NOTHING")  # fmt: skip
    tables.ask(
        "UPDATE pgbarrier_task SET state = 'running',"
        " worker = '00000000-0000-4000-8000-000000000001' WHERE id = :id",
        id=task_id,
    )


def test_a_message_that_waits_for_long_is_not_given_up(
    backend: BarrierBackend, redis_broker: Broker, tables: Tables
) -> None:
    """Nobody works: however often it was published, nothing shows that anybody took it."""
    result = chord([add.s(1, 1)], xsum.s()).delay()
    tables.ask("UPDATE pgbarrier_task SET publications = 50")
    for _ in range(3):
        tables.overdue()
        assert reaper.run_once(backend).tasks_failed == 0
    assert result.state == "PENDING"


def test_a_backlog_is_written_once_in_a_quarter_of_the_back_off(
    backend: BarrierBackend, tables: Tables
) -> None:
    """Looking at what waits costs an update a row, so it is looked at seldom."""
    chord([add.s(n, n) for n in range(SIZE)], xsum.s()).delay()
    tables.overdue()
    assert reaper.run_once(backend).messages_deferred == SIZE - 1
    assert reaper.run_once(backend).messages_deferred == 0
    pass_time(tables, 74)
    assert reaper.run_once(backend).messages_deferred == 0
    pass_time(tables, 2)
    assert reaper.run_once(backend).messages_deferred == SIZE - 1


def test_a_broker_that_is_away_tells_nothing(
    make_app: Callable[..., Celery], database_url: str
) -> None:
    away = private_broker("redis://127.0.0.1:1/0", socket_connect_timeout=0.2)
    app = make_app(away, databases.backend_url(database_url), broker_connection_max_retries=0)
    assert queues.empty(app, ["celery"]) == set()


def test_a_name_that_is_no_queue_tells_nothing(
    make_app: Callable[..., Celery], rabbitmq_broker: Broker, database_url: str
) -> None:
    """A routing key of an exchange is kept as a message's queue where no queue is declared."""
    app = make_app(rabbitmq_broker, databases.backend_url(database_url))
    assert queues.empty(app, ["a.routing.key", rabbitmq_broker.queue]) == {rabbitmq_broker.queue}
