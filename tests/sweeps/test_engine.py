"""The loop: limits, timeouts, trouble that passes."""

from __future__ import annotations

import threading
from datetime import datetime, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from sqlalchemy.exc import OperationalError

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps import Counts, Purge, Stop
from celery_pgbarrier.sweeps import engine as loop
from celery_pgbarrier.sweeps.engine import Batch, BatchSize, Limits, run_batches
from tests.support.tables import Tables
from tests.sweeps.models import Document, fill_documents, ids


class ServerError(Exception):
    def __init__(self, sqlstate: str) -> None:
        super().__init__(sqlstate)
        self.pgcode = sqlstate


def error(sqlstate: str) -> OperationalError:
    return OperationalError("UPDATE", {}, ServerError(sqlstate))


def test_timeouts_halve_the_batch_and_calm_doubles_it() -> None:
    sizes: list[int] = []

    def step(size: int) -> Batch:
        sizes.append(size)
        if len(sizes) in (1, 2):
            raise error("57014" if len(sizes) == 1 else "55P03")
        return Batch(size, more=len(sizes) < 14)

    counts = Counts()
    run_batches(step, Limits(100), counts)
    assert sizes == [100, 50, *[25] * 5, *[50] * 5, 100, 100]
    assert (counts.batches, counts.stopped) == (12, None)


def test_a_table_that_stays_locked_ends_the_run(engine: sa.Engine) -> None:
    fill_documents(engine, 3)
    sweep = Purge("documents", Document, where=Document.id > 0, batch_size=4, lock_timeout=0.02)
    assert sweep.run(engine, max_batches=1, batch_size=1).rows == 1
    with engine.begin() as holder:
        holder.exec_driver_sql("LOCK TABLE documents IN SHARE MODE")
        counts = sweep.run(engine)
        assert (counts.rows, counts.left, counts.stopped) == (0, 2, Stop.TIMEOUTS)
    assert sweep.run(engine).rows == 2


def test_a_slow_statement_is_tried_with_fewer_rows(engine: sa.Engine) -> None:
    fill_documents(engine, 20)
    with engine.begin() as connection:
        connection.exec_driver_sql("""
            CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_sleep(0.02); RETURN OLD; END $$;
            CREATE TRIGGER slow BEFORE DELETE ON documents FOR EACH ROW EXECUTE FUNCTION slow();
        """)
    sweep = Purge(
        "documents", Document, where=Document.id > 0, batch_size=20, statement_timeout=0.25
    )
    counts = sweep.run(engine)
    assert (counts.rows, counts.left) == (20, 0)
    assert counts.batches > 1


@pytest.mark.parametrize("sqlstate", ["40P01", "40001", "57P01"])
def test_trouble_that_passes_is_tried_again(sqlstate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "pause", lambda seconds, stop: None)
    tries: list[int] = []

    def step(size: int) -> Batch:
        tries.append(size)
        if len(tries) < 3:
            raise error(sqlstate)
        return Batch(1, more=False)

    counts = Counts()
    run_batches(step, Limits(10, retries=2), counts)
    assert (tries, counts.rows) == ([10, 10, 10], 1)
    tries.clear()
    with pytest.raises(OperationalError):
        run_batches(step, Limits(10, retries=1), Counts())


def test_a_broken_connection_in_the_middle(engine: sa.Engine, database_url: str) -> None:
    fill_documents(engine, 30)
    tables, cut = Tables(database_url), []

    def hook(document: Document) -> None:
        if document.id == 15 and not cut:
            cut.append(tables.cut_connections())

    sweep = Purge("documents", Document, where=Document.id > 0, batch_size=10, before_delete=hook)
    counts = sweep.run(engine)
    assert (counts.rows, counts.failed, ids(engine)) == (30, 0, set())
    assert cut == [1]


@pytest.mark.parametrize(
    ("limits", "rows", "stopped"),
    [
        ({"max_batches": 2}, 20, Stop.MAX_BATCHES),
        ({"max_seconds": 0}, 0, Stop.MAX_SECONDS),
        ({"batch_size": 5, "max_batches": 1}, 5, Stop.MAX_BATCHES),
        ({"enabled": False}, 0, Stop.DISABLED),
        ({"pause": 0.01}, 30, None),
    ],
)
def test_limits(engine: sa.Engine, limits: Any, rows: int, stopped: Stop | None) -> None:
    fill_documents(engine, 30)
    sweep = Purge("documents", Document, where=Document.id > 0, batch_size=10)
    counts = sweep.run(engine, **limits)
    assert (counts.rows, counts.stopped) == (rows, stopped)


def test_a_pause_ends_when_it_is_told_to() -> None:
    asked = threading.Event()
    asked.set()
    loop.pause(60, asked.is_set)


def test_the_clock_is_the_databases_or_the_callers(engine: sa.Engine) -> None:
    fill_documents(engine, 3)
    seen: list[datetime] = []

    def where(now: datetime) -> Any:
        seen.append(now)
        return Document.deleted_at < now

    sweep = Purge("documents", Document, where=where)
    past = datetime(2001, 1, 1, tzinfo=timezone.utc)
    assert sweep.run(engine, now=past).rows == 0
    assert set(seen) == {past}
    with pytest.raises(ConfigurationError, match="time zone"):
        sweep.run(engine, now=datetime(2001, 1, 1))
    assert sweep.run(engine).rows == 3
    assert seen[-1].tzinfo is timezone.utc


def test_size_is_never_below_one() -> None:
    size = BatchSize(3)
    assert [size.timed_out() for _ in range(4)] == [True, True, True, False]
    assert size.now == 1


#: Notes how many rows each statement deletes, and in which transaction.
DELETED = (
    "CREATE TABLE batch (at serial, xid text DEFAULT pg_current_xact_id(), deleted bigint)",
    """
    CREATE FUNCTION note_batch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO batch (deleted) SELECT count(*) FROM gone HAVING count(*) > 0;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER note_batch AFTER DELETE ON pgbarrier_task REFERENCING OLD TABLE AS gone
        FOR EACH STATEMENT EXECUTE FUNCTION note_batch()
    """,
)


def test_cleanup_of_our_own_results_uses_the_loop(app: Celery, database_url: str) -> None:
    tables = Tables(database_url)
    app.conf.pgbarrier_batch_size = 100
    backend = app.backend
    tables.ask("""
        INSERT INTO pgbarrier_task (id, state, expires_at)
        SELECT 'old-' || n, 'done', now() - interval '1 day' FROM generate_series(1, 250) AS n
    """)
    tables.ask("""
        INSERT INTO pgbarrier_task (id, state, expires_at)
        VALUES ('young', 'done', now() + interval '1 day'), ('live', 'queued', NULL)
    """)
    for statement in DELETED:
        tables.ask(statement)
    backend.cleanup()
    batches = tables.ask("SELECT deleted FROM batch ORDER BY at")
    assert [row.deleted for row in batches] == [100, 100, 50]
    assert tables.ask("SELECT count(DISTINCT xid) FROM batch")[0][0] == 3
    assert {row.id for row in tables.ask("SELECT id FROM pgbarrier_task")} == {"young", "live"}
