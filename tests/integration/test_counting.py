"""Counting members: one statement, one transaction, no row that all of them lock, one last one."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, chord
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from celery_pgbarrier import barrier, lease, writing
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.store.tasks import slots_for
from celery_pgbarrier.unit import Fence, Outcome, Unit
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker, workers
from tests.support.tables import Tables
from tests.support.tasks import add, identity, plain, xsum
from tests.support.wire import Wire

TRANSACTION = ("BEGIN", "COMMIT", "ROLLBACK", "SET ", "SAVEPOINT")


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


def held(backend: BarrierBackend, tables: Tables, size: int) -> dict[str, str]:
    """Start a chord of *size* members and claim them all; their tokens by id, in order."""
    result = chord([add.s(n, n) for n in range(size)], xsum.s()).delay()
    lease.beat(backend)
    tables.ask(
        "UPDATE pgbarrier_task SET state = 'running', token = gen_random_uuid(), attempt = 1,"
        " worker = CAST(:worker AS uuid), pid = 1, due_at = NULL WHERE barrier_id IS NOT NULL",
        worker=lease.boot.current(),
    )
    rows = tables.ask("SELECT id, CAST(token AS text) FROM pgbarrier_task ORDER BY position")
    tokens = {row[0]: row[1] for row in rows}
    assert list(tokens) == [child.id for child in result.parent.results]
    return tokens


def outcome(
    backend: BarrierBackend, task_id: str, token: str, barrier_id: str | None = None
) -> Unit:
    """A member's outcome: by the short statement for a barrier that is known, or by the long."""
    unit = Unit()
    meta = backend._meta(1, "SUCCESS", None, None)
    fence = Fence(token=token, barrier=barrier_id)
    unit.primary = Outcome(task_id, "SUCCESS", meta, fence=fence)
    return unit


# -- statements


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
@pytest.mark.parametrize("kind", [add, plain.add], ids=["claimed", "plain"])
def test_finishing_a_member_is_one_statement_and_one_transaction(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire, tables: Tables,
    driver: str, kind: Any,
) -> None:  # fmt: skip
    """Counted on the wire. A member's start is a statement too; nothing else is said."""
    url = databases.with_driver(wire.url, driver)
    app = make_app(redis_broker, databases.backend_url(url))
    with workers(app, redis_broker) as make:
        worker = make()
        chord([kind.s(n, n) for n in range(9)], xsum.s()).delay()
        messages = worker.take_all()
        worker.run(messages[0])  # a connection is made, the worker registered
        wire.said.clear()
        worker.run(messages[1])
        start, *finish = wire.said
        assert "'running'" in start or "pgbarrier_claim_queued" in start
        assert len(finish) == 1, f"more than one statement: {finish}"
        (said,) = finish
        assert not said.lstrip().startswith(TRANSACTION)
        counts = all(f"pgbarrier_{table}" in said for table in ("task", "slot", "barrier"))
        assert counts or "pgbarrier_finish_member" in said
    assert tables.count("task", "state = 'done'") == 2


# -- locks


def locked_rows(engine: Any, connection: Connection) -> set[tuple[str, str]]:
    """The rows that *connection* has locked or written, seen from another connection."""
    found = set()
    with engine.connect() as other:
        for table, key in (
            ("task", "id"),
            ("slot", "barrier_id || '/' || slot"),
            ("barrier", "id"),
        ):
            every = other.execute(text(f"SELECT {key} FROM pgbarrier_{table}")).scalars().all()
            free = other.execute(
                text(f"SELECT {key} FROM pgbarrier_{table} FOR UPDATE SKIP LOCKED")
            )
            found |= {(table, row) for row in set(every) - set(free.scalars())}
        other.rollback()
    return found


@pytest.mark.parametrize("size", [4, 30])
def test_no_row_is_locked_by_all_members(
    backend: BarrierBackend, tables: Tables, database_url: str, size: int
) -> None:
    tokens = held(backend, tables, size)
    engine = create_engine(database_url, poolclass=NullPool)
    locked_by: dict[tuple[str, str], int] = {}
    for task_id, token in tokens.items():
        with engine.connect() as connection:
            writing.write(connection, backend, outcome(backend, task_id, token))
            rows = locked_rows(engine, connection)
            assert ("task", task_id) in rows
            for row in rows:
                locked_by[row] = locked_by.get(row, 0) + 1
            connection.commit()
    assert max(locked_by.values()) < size
    slots = slots_for(size)
    per_slot = -(-size // slots)
    for (table, _), times in locked_by.items():
        assert times <= {"task": 1, "slot": per_slot, "barrier": slots}[table]


def test_members_of_different_slots_do_not_wait_for_each_other(
    backend: BarrierBackend, tables: Tables, database_url: str
) -> None:
    """One transaction is left open for each slot, and none of them waits."""
    tokens = held(backend, tables, 30)
    slots = slots_for(30)
    engine = create_engine(database_url, poolclass=NullPool)
    connections = []
    try:
        for task_id, token in list(tokens.items())[:slots]:
            connections.append(engine.connect())
            connections[-1].execute(text("SET LOCAL lock_timeout = '2s'"))
            writing.write(connections[-1], backend, outcome(backend, task_id, token))
    finally:
        for connection in connections:
            connection.commit()
            connection.close()
    assert tables.count("task", "state = 'done'") == slots


# -- races


def test_1200_members_from_6_connections_with_duplicates_have_one_last_finisher(
    backend: BarrierBackend, tables: Tables, redis_broker: Broker
) -> None:
    """A tenth is finished twice: once with the same claim, once by whoever has lost it."""
    size, threads = 1200, 6
    tokens = held(backend, tables, size)
    redis_broker.purge()
    rng = random.Random(7)
    work = list(tokens.items())
    twice = rng.sample(work, size // 10)
    stale = [(task_id, "00000000-0000-4000-8000-000000000000") for task_id, _ in twice[:40]]
    work += twice + stale
    rng.shuffle(work)
    shares = [work[number::threads] for number in range(threads)]
    start = threading.Barrier(threads)
    committed: list[Any] = []
    errors: list[BaseException] = []

    def finish(share: list[tuple[str, str]]) -> None:
        try:
            start.wait(30)
            for task_id, token in share:
                committed.append(barrier.commit(backend, outcome(backend, task_id, token), 5))
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=finish, args=(share,)) for share in shares]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    assert errors == []
    accepted = [found for found in committed if found is not None]
    assert len(accepted) == size
    last = [barrier_id for found in accepted for barrier_id in found.ready]
    assert len(last) == 1
    assert tables.barrier_states() == ["ready"]
    assert tables.value("SELECT sum(remaining) FROM pgbarrier_slot") == 0
    assert tables.value("SELECT open_slots FROM pgbarrier_barrier") == 0


def test_only_one_of_many_releases_a_barrier(
    backend: BarrierBackend, tables: Tables, redis_broker: Broker
) -> None:
    tokens = held(backend, tables, 3)
    redis_broker.purge()
    ready = [
        found.ready
        for task_id, token in tokens.items()
        if (found := barrier.commit(backend, outcome(backend, task_id, token), 5))
    ]
    (barrier_id,) = itertools.chain(*ready)
    released: list[bool] = []
    start = threading.Barrier(6)

    def release() -> None:
        start.wait(30)
        released.append(barrier.release(backend, barrier_id))

    running = [threading.Thread(target=release) for _ in range(6)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(30)
    assert sorted(released) == [False] * 5 + [True]
    assert redis_broker.depth() == 1


def test_duplicate_deliveries_count_once(worker: InlineWorker, tables: Tables) -> None:
    result = chord([add.s(n, n) for n in range(5)], identity.s()).delay()
    messages = worker.take_all()
    for message in messages[:4] * 3:
        worker.run(worker.request(message.message))
    assert tables.barrier_states() == ["waiting"]
    worker.run(messages[4])
    worker.drain()
    assert result.get(timeout=5) == [0, 2, 4, 6, 8]


def test_the_first_outcome_of_a_member_stands(
    backend: BarrierBackend, tables: Tables, worker: InlineWorker
) -> None:
    result = chord([plain.add.s(1, 1), add.s(2, 2)], identity.s()).delay()
    first, second = worker.take_all()
    worker.run(first)
    backend.mark_as_failure(first.id, ValueError("late"))
    backend.mark_as_done(first.id, 99)
    worker.run(second)
    worker.drain()
    assert result.get(timeout=5) == [2, 4]
