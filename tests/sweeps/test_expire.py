"""Expire: bounded statements, nothing read into Python, terminal states left alone."""

from __future__ import annotations

import threading
import time
import tracemalloc
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps import Expire, Stop
from tests.sweeps.models import Document, fill_documents, ids, objects, readings


def stale(batch_size: int = 1000, **options: Any) -> Expire:
    return Expire(
        "objects",
        objects,
        where=objects.c.number <= 1_000_000,
        values={"status": "stale"},
        terminal={objects.c.status: ["done", "failed"]},
        order_by=objects.c.number,
        batch_size=batch_size,
        **options,
    )


def fill_objects(engine: sa.Engine, numbers: str, status: str = "active") -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO objects (id, status, number) "
                f"SELECT gen_random_uuid(), :status, n FROM generate_series({numbers}) AS n"
            ),
            {"status": status},
        )


def states(engine: sa.Engine) -> dict[str, int]:
    query = sa.select(objects.c.status, sa.func.count().label("count")).group_by(objects.c.status)
    with engine.connect() as connection:
        return {row.status: row.count for row in connection.execute(query)}


def test_three_two_none(engine: sa.Engine) -> None:
    fill_objects(engine, "1, 5")
    sweep = stale(3, max_batches=1)
    runs = [sweep.run(engine) for _ in range(3)]
    assert [run.rows for run in runs] == [3, 2, 0]
    assert [run.left for run in runs] == [2, 0, 0]
    assert [run.stopped for run in runs] == [Stop.MAX_BATCHES, None, None]


def test_terminal_states_are_left_alone(engine: sa.Engine) -> None:
    for status in ("active", "done", "failed", "stale"):
        fill_objects(engine, "1, 5", status)
    assert stale().run(engine).rows == 5
    assert states(engine) == {"done": 5, "failed": 5, "stale": 10}


def test_a_row_that_refuses_is_found_and_left(engine: sa.Engine) -> None:
    fill_objects(engine, "1, 300")
    counts = stale(100).run(engine)
    assert (counts.rows, counts.failed, counts.left) == (299, 1, 1)
    assert "CheckViolation" in counts.failures[0].error
    assert states(engine) == {"active": 1, "stale": 299}


def test_composite_keys(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        rows = [{"device": d, "at": n, "value": n} for d in "abc" for n in range(7)]
        connection.execute(sa.insert(readings), rows)
    sweep = Expire(
        "readings", readings, where=readings.c.at < 5, values={"value": None}, batch_size=4
    )
    counts = sweep.run(engine)
    assert (counts.rows, counts.batches) == (15, 4)


def test_no_row_is_read_into_python(engine: sa.Engine) -> None:
    fill_objects(engine, "101, 350")
    fetched: list[str] = []

    def after(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if cursor.description is not None and "objects" in statement.lower():
            fetched.append(statement)

    sweep = stale(100)
    sweep.run(engine)  # asks for the plan, once in a process
    fill_objects(engine, "401, 650")
    sa.event.listen(engine, "after_cursor_execute", after)
    assert sweep.run(engine).rows == 250
    assert [statement for statement in fetched if "count(*)" not in statement] == []


def test_moving_values_are_set_once_in_a_run(engine: sa.Engine) -> None:
    fill_documents(engine, 5)
    sweep = Expire(
        "documents",
        Document,
        where=Document.id < 4,
        values={"deleted_at": sa.func.now(), "path": sa.func.upper("x")},
        batch_size=2,
    )
    assert sweep.run(engine).rows == 3
    assert ids(engine, Document.path == "X") == {1, 2, 3}


def test_values_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="plain value"):
        Expire("d", Document, where=sa.true(), values={Document.path: Document.path + "x"})


def test_the_batch_size_is_configured(
    app: Celery, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_objects(engine, "101, 130")
    sweep = stale(20, max_batches=1)
    sweep.register(app)
    app.conf.pgbarrier_sweeps = {"objects": {"batch_size": 7}}
    assert sweep.run().rows == 7
    monkeypatch.setenv("PGBARRIER_SWEEP_OBJECTS_BATCH_SIZE", "5")
    assert sweep.run().rows == 5
    assert sweep.run(batch_size=3).rows == 3
    monkeypatch.setenv("PGBARRIER_SWEEP_OBJECTS_ENABLED", "false")
    assert sweep.run().stopped is Stop.DISABLED
    monkeypatch.setenv("PGBARRIER_SWEEP_OBJECTS_ENABLED", "perhaps")
    with pytest.raises(ConfigurationError, match="OBJECTS_ENABLED must be true or false"):
        sweep.run()


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        ({"objekts": {}}, "no sweep 'objekts', did you mean 'objects'"),
        ({"objects": {"size": 3}}, r"pgbarrier_sweeps\['objects'\]: no option 'size'"),
        ({"objects": {"batch_size": "many"}}, "batch_size must be a whole number"),
    ],
)
def test_a_wrong_setting_is_an_error(app: Celery, configured: Any, message: str) -> None:
    sweep = stale()
    sweep.register(app)
    app.conf.pgbarrier_sweeps = configured
    with pytest.raises(ConfigurationError, match=message):
        sweep.run()


# -- a large table under load


class Writers:
    """Threads that update rows all the time, and do not wait for a lock longer than 100 ms."""

    def __init__(self, engine: sa.Engine, rows: int) -> None:
        self._engine, self._rows = engine, rows
        self._stop = threading.Event()
        self.writes = self.waits = 0
        self._threads = [threading.Thread(target=self._write, args=(n,)) for n in range(2)]

    def _write(self, start: int) -> None:
        number = start
        with self._engine.connect() as connection:
            connection.exec_driver_sql("SET lock_timeout = '100ms'")
            while not self._stop.wait(0.005):
                number = (number + 7919) % self._rows + 1
                change = sa.update(objects).where(objects.c.number == number + 1000)
                try:
                    connection.execute(change.values(number=objects.c.number))
                    connection.commit()
                    self.writes += 1
                except sa.exc.OperationalError:
                    connection.rollback()
                    self.waits += 1

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Transactions:
    """How long each transaction of an engine took, in seconds."""

    def __init__(self, engine: sa.Engine) -> None:
        self.lengths: list[float] = []
        begun: dict[Any, float] = {}
        sa.event.listen(engine, "begin", lambda c: begun.update({c: time.monotonic()}))
        for end in ("commit", "rollback"):
            sa.event.listen(
                engine, end, lambda c: self.lengths.append(time.monotonic() - begun.pop(c))
            )


@pytest.mark.slow
def test_a_large_table_under_load(engine: sa.Engine, database_url: str) -> None:
    rows = 100_000  # benchmarks/sweeps.py does 300,000
    fill_objects(engine, f"1001, {1000 + rows}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE INDEX ON objects (status, number)")
        connection.exec_driver_sql("CREATE INDEX ON objects (number)")
    sweeping = sa.create_engine(database_url)
    transactions = Transactions(sweeping)
    where = (objects.c.status == "active") & (objects.c.number <= 1_000_000)
    sweep = Expire(
        "objects", objects, where=where, values={"status": "stale"}, order_by=objects.c.number
    )
    sweep.run(sweeping, max_batches=5)
    tracemalloc.start()
    early = tracemalloc.get_traced_memory()[0]
    with Writers(engine, rows) as writers:
        counts = sweep.run(sweeping)
        waits, writes = writers.waits, writers.writes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.rows >= rows - 5000 - 2  # of which the writers may hold two at a time
    assert sweep.run(sweeping).left == 0
    sweeping.dispose()
    assert states(engine) == {"stale": rows}
    assert max(transactions.lengths) < 1.0
    assert peak - early < 8_000_000
    assert (waits, writes > 50) == (0, True)
