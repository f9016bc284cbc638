"""One run at a time, without session state, whoever dies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from celery_pgbarrier.sweeps import Counts, Expire, Purge, Stop
from tests.support.tables import Tables
from tests.support.waiting import wait_until
from tests.sweeps.models import Document, fill_documents, ids


def make(**options: Any) -> Purge:
    return Purge("documents", Document, where=Document.id > 0, batch_size=10, **options)


@contextmanager
def running(engine: sa.Engine) -> Iterator[Callable[[], Counts]]:
    """Let a run go on to its first report; calling what is given lets it go on and end."""
    begun, go_on, found = threading.Event(), threading.Event(), []

    def report(counts: Counts) -> None:
        begun.set()
        assert go_on.wait(30)

    thread = threading.Thread(target=lambda: found.append(make().run(engine, report=report)))
    thread.start()

    def finish() -> Counts:
        go_on.set()
        thread.join(30)
        return found[0]

    try:
        assert begun.wait(30)
        yield finish
    finally:
        finish()


def test_a_second_run_says_so_and_leaves(
    engine: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    fill_documents(engine, 25)
    caplog.set_level("INFO")
    with running(engine) as finish:
        counts = make().run(engine)
        assert (counts.stopped, counts.rows) == (Stop.BUSY, 0)
        assert "has the turn until" in caplog.text
        assert finish().rows == 25
    assert make().run(engine).stopped is None


def test_other_sweeps_of_the_table_may_run(engine: sa.Engine) -> None:
    fill_documents(engine, 25)
    other = Expire("others", Document, where=Document.id > 20, values={"status": "old"})
    with running(engine) as finish:
        assert other.run(engine).rows == 5
        assert finish().rows == 25


def test_a_run_that_died_gives_way_after_its_lease(engine: sa.Engine, database_url: str) -> None:
    fill_documents(engine, 25)
    tables = Tables(database_url)
    with running(engine) as finish:
        tables.ask("UPDATE pgbarrier_sweep SET expires_at = clock_timestamp() - interval '1 s'")
        assert make().run(engine).rows == 15
        counts = finish()
        assert (counts.rows, counts.stopped) == (10, Stop.LOST_TURN)
    assert ids(engine) == set()


def test_no_two_batches_at_once_without_our_tables(bare_engine: sa.Engine) -> None:
    fill_documents(bare_engine, 25)
    inside, go_on = threading.Event(), threading.Event()

    def hook(document: Document) -> None:
        inside.set()
        assert go_on.wait(30)

    found: list[Counts] = []
    first = make(before_delete=hook)
    thread = threading.Thread(target=lambda: found.append(first.run(bare_engine)))
    thread.start()
    try:
        assert inside.wait(30)
        assert make().run(bare_engine).stopped is Stop.BUSY
    finally:
        go_on.set()
        thread.join(30)
    assert (found[0].rows, ids(bare_engine)) == (25, set())


def test_a_role_without_rights_on_our_table_can_sweep(engine: sa.Engine, database_url: str) -> None:
    fill_documents(engine, 5)
    with engine.begin() as connection:
        connection.exec_driver_sql("REVOKE ALL ON pgbarrier_sweep FROM PUBLIC")
        connection.exec_driver_sql("DROP ROLE IF EXISTS sweeper_of_tests")
        connection.exec_driver_sql("CREATE ROLE sweeper_of_tests")
        connection.exec_driver_sql("GRANT ALL ON documents TO sweeper_of_tests")
    try:
        limited = sa.create_engine(
            database_url,
            poolclass=sa.NullPool,
            connect_args={"options": "-c role=sweeper_of_tests"},
        )
        assert make().run(limited).rows == 5
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP OWNED BY sweeper_of_tests")
            connection.exec_driver_sql("DROP ROLE sweeper_of_tests")


def test_nothing_hangs_on_a_session(engine: sa.Engine, database_url: str) -> None:
    """Each transaction on another session, wiped before and after, as a pooler may hand it out."""
    fill_documents(engine, 25)
    sessions: set[int] = set()
    pooled = sa.create_engine(database_url, poolclass=sa.NullPool)

    @sa.event.listens_for(pooled, "begin")
    def began(connection: sa.Connection) -> None:
        sessions.add(connection.connection.dbapi_connection.info.backend_pid)

    counts = make(before_delete=lambda row: None, mark={"status": "gone"}).run(pooled)
    assert counts.rows == 25
    assert len(sessions) > 5
    with pooled.connect() as connection:
        settings = connection.exec_driver_sql("SHOW lock_timeout").scalar()
    assert settings == "0"


def test_the_last_run_is_kept(engine: sa.Engine, database_url: str) -> None:
    fill_documents(engine, 25)
    make().run(engine, max_batches=1)
    (row,) = Tables(database_url).ask("SELECT * FROM pgbarrier_sweep")
    assert (row.name, row.token, row.batches, row.rows, row.failed, row.left_over, row.stopped) == (
        "documents", None, 1, 10, 0, 15, "max_batches",
    )  # fmt: skip
    wait_until(lambda: row.finished_at is not None, 1)


def test_an_error_ends_the_turn(engine: sa.Engine) -> None:
    broken = Purge("documents", Document, where=sa.text("no_such_column"))
    with pytest.raises(sa.exc.ProgrammingError):
        broken.run(engine)
    assert make().run(engine).stopped is None
