"""The tests' own tools: what they promise to the tests that trust them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery, chord
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.pool import NullPool

from tests.support import databases
from tests.support.brokers import Broker
from tests.support.tasks import add, noted_sum, notes, plain, sleepy
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess


def tables(url: str) -> set[str]:
    return set(inspect(create_engine(url, poolclass=NullPool)).get_table_names())


def test_databases_are_migrated_or_empty(database_url: str, empty_database_url: str) -> None:
    assert "pgbarrier_task" in tables(database_url)
    assert tables(empty_database_url) == set()
    assert tables(databases.with_driver(database_url, "psycopg")) == tables(database_url)


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("SELECT 1", "idle in transaction"),
        ("SELECT pg_advisory_xact_lock(1)", "advisory lock"),
    ],
)
def test_open_transactions_and_locks_are_found(
    postgres_server: str, database_url: str, statement: str, found: str
) -> None:
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(statement))
        assert found in "\n".join(databases.leaks(postgres_server, database_url, grace=0))
    assert databases.leaks(postgres_server, database_url) == []


def test_a_worker_runs_a_chord(
    database_url: str,
    each_broker: Broker,
    make_app: Callable[..., Celery],
    start_worker: Callable[..., WorkerProcess],
    tmp_path: Path,
) -> None:
    backend = databases.backend_url(database_url)
    make_app(each_broker, backend)
    path = tmp_path / "sums"
    result = chord([add.s(1, 1), plain.add.s(2, 2)], noted_sum.s(str(path))).delay()
    wait_until(lambda: each_broker.depth() >= 2, message="two messages wait")
    start_worker(each_broker, backend)
    assert result.get(timeout=60) == 6
    assert notes(path) == ["6"]


def test_messages_can_be_lost(redis_broker: Broker, rabbitmq_broker: Broker) -> None:
    for broker in (redis_broker, rabbitmq_broker):
        assert broker.purge() == 0
        with broker.connection() as connection:
            queue = connection.SimpleQueue(broker.queue)
            queue.put({"hello": 1})
            queue.close()
        wait_until(lambda broker=broker: broker.depth() == 1, message="one message waits")
        assert broker.purge() == 1
        assert broker.depth() == 0


def test_a_pool_loses_its_children(
    database_url: str,
    redis_broker: Broker,
    make_app: Callable[..., Celery],
    start_worker: Callable[..., WorkerProcess],
    tmp_path: Path,
) -> None:
    backend = databases.backend_url(database_url)
    make_app(redis_broker, backend)
    worker = start_worker(redis_broker, backend, concurrency=2)
    started, gate = tmp_path / "started", tmp_path / "gate"
    sleepy.delay(1, str(gate), str(started))
    wait_until(started.exists, message="the task has started")
    before = set(worker.children())
    assert set(worker.kill_children()) == before
    wait_until(lambda: len(set(worker.children()) - before) == 2, message="two new children")
    gate.touch()
    worker.kill()
    assert not worker.running
    worker.start()
    worker.wait_ready()
    assert worker.stop() == 0
