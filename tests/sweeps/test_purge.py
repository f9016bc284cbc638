"""Purge and SoftDelete: what goes, what stays, and what one bad row does to the others."""

from __future__ import annotations

import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps import Counts, Purge, SoftDelete, Stop, purge
from tests.support import databases
from tests.sweeps.models import (
    Animal,
    Cat,
    Document,
    Page,
    Whale,
    fill_documents,
    ids,
    keyless,
    objects,
    readings,
)


def old(now: Any) -> Any:
    return Document.deleted_at < now - timedelta(days=30)


def fails_at(number: int) -> Any:
    def hook(document: Document) -> None:
        if document.id == number:
            raise RuntimeError("the vector store is away")

    return hook


# -- one bad row


def test_abort_keeps_what_was_purged(engine: sa.Engine) -> None:
    fill_documents(engine, 250)
    sweep = Purge("documents", Document, where=old, before_delete=fails_at(220), on_error="abort")
    counts = sweep.run(engine)
    assert (counts.batches, counts.rows, counts.failed, counts.left) == (3, 219, 1, 31)
    assert counts.stopped is Stop.ABORTED
    assert ids(engine) == set(range(220, 251))
    assert sweep.run(engine).rows == 0
    assert ids(engine) == set(range(220, 251))


@pytest.mark.parametrize("options", [{}, {"mark": {"status": "purging"}}], ids=["plain", "marked"])
def test_by_default_the_others_go(engine: sa.Engine, options: Any) -> None:
    fill_documents(engine, 250)
    sweep = Purge("documents", Document, where=old, before_delete=fails_at(220), **options)
    counts = sweep.run(engine)
    assert (counts.rows, counts.failed, counts.left, counts.stopped) == (249, 1, 1, None)
    assert [(f.key, f.error) for f in counts.failures] == [
        ((220,), "RuntimeError: the vector store is away")
    ]
    assert ids(engine) == {220}


def test_a_row_that_others_refer_to_is_found_and_left(engine: sa.Engine) -> None:
    fill_documents(engine, 250)
    with engine.begin() as connection:
        connection.execute(sa.insert(Page), [{"document_id": 77}, {"document_id": 130}])
    seen: list[int] = []
    for hook in (None, lambda document: seen.append(document.id)):
        counts = Purge("documents", Document, where=old, before_delete=hook).run(engine)
        assert (counts.failed, counts.left) == (2, 2)
        assert "ForeignKeyViolation" in counts.failures[0].error
        assert ids(engine) == {77, 130}
    assert seen == [77, 130]


def test_a_run_ends_when_too_much_fails(engine: sa.Engine) -> None:
    fill_documents(engine, 50)

    def hook(document: Document) -> None:
        raise OSError("disk is gone")

    sweep = Purge(
        "documents", Document, where=old, before_delete=hook, batch_size=10, max_failed=20
    )
    counts = sweep.run(engine)
    assert (counts.failed, counts.rows, counts.stopped) == (20, 0, Stop.MAX_FAILED)


# -- batches


def test_batches_are_transactions_of_their_own(engine: sa.Engine) -> None:
    fill_documents(engine, 250)
    seen: list[tuple[int, int]] = []

    def report(counts: Counts) -> None:
        seen.append((counts.rows, len(ids(engine))))

    counts = Purge("documents", Document, where=old).run(engine, report=report)
    assert seen == [(100, 150), (200, 50), (250, 0)]
    assert counts.left == 0


def test_rows_that_another_transaction_holds_are_passed_over(engine: sa.Engine) -> None:
    fill_documents(engine, 30)
    sweep = Purge("documents", Document, where=old, batch_size=10)
    with engine.begin() as holder:
        holder.execute(sa.select(Document.id).where(Document.id == 5).with_for_update())
        assert sweep.run(engine).left == 1
    assert ids(engine) == {5}
    assert sweep.run(engine).rows == 1


def test_a_batch_with_slow_hooks_is_committed_early(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purge, "_LONG", 0.0)
    fill_documents(engine, 7)
    counts = Purge("documents", Document, where=old, before_delete=lambda row: None).run(engine)
    assert (counts.rows, counts.batches) == (7, 7)


def test_a_hook_that_asks_for_more_than_it_was_given_fails_alone(engine: sa.Engine) -> None:
    fill_documents(engine, 3)
    touched: list[int] = []

    def hook(document: Document) -> None:
        touched.append(len(document.pages))

    counts = Purge("documents", Document, where=old, before_delete=hook).run(engine)
    assert counts.failed == 3
    assert "DetachedInstanceError" in counts.failures[0].error
    load = [sa.orm.selectinload(Document.pages)]
    sweep = Purge("documents", Document, where=old, before_delete=hook, load=load)
    assert sweep.run(engine).rows == 3
    assert touched == [0, 0, 0]


# -- marks


def test_a_marked_row_goes_in_the_next_run(engine: sa.Engine, tmp_path: Path) -> None:
    """A run that died between its mark and its delete has left row 1 without its file."""
    fill_documents(engine, 3)
    with engine.begin() as connection:
        connection.execute(
            sa.update(Document).where(Document.id == 1).values(status="purging", deleted_at=None)
        )
    hooked: list[int] = []
    sweep = Purge(
        "documents",
        Document,
        where=old,
        mark={Document.status: "purging"},
        before_delete=lambda row: hooked.append(row.id),
    )
    assert sweep.run(engine).rows == 3
    assert hooked == [1, 2, 3]


def test_hooks_see_only_committed_marks(engine: sa.Engine) -> None:
    fill_documents(engine, 5)
    seen: list[set[int]] = []
    sweep = Purge(
        "documents",
        Document,
        where=old,
        mark={"status": "purging"},
        batch_size=2,
        before_delete=lambda row: seen.append(ids(engine, Document.status == "live")),
    )
    assert sweep.run(engine).rows == 5
    assert seen == [{3, 4, 5}, {3, 4, 5}, {5}, {5}, set()]


def test_a_moving_mark_needs_a_condition(engine: sa.Engine) -> None:
    with pytest.raises(ConfigurationError, match="marked="):
        Purge("documents", Document, where=old, mark={"deleted_at": sa.func.now()})
    fill_documents(engine, 3)
    sweep = Purge(
        "documents",
        Document,
        where=Document.path.is_(None),
        mark={"path": lambda now: f"gone {now}"},
        marked=Document.path.startswith("gone"),
    )
    assert sweep.run(engine).rows == 3


# -- soft delete


def test_soft_delete_sets_values_after_its_hook(engine: sa.Engine) -> None:
    fill_documents(engine, 5)
    hooked: list[int] = []
    sweep = SoftDelete(
        "documents",
        Document,
        where=lambda now: Document.id > 2,
        values={"status": "deleted", "deleted_at": sa.func.now()},
        before=lambda row: hooked.append(row.id),
        batch_size=2,
    )
    counts = sweep.run(engine)
    assert (counts.rows, counts.batches, counts.left) == (3, 2, 0)
    assert hooked == [3, 4, 5]
    assert ids(engine, Document.status == "deleted") == {3, 4, 5}
    assert sweep.run(engine).rows == 0


# -- keys and tables


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
@pytest.mark.parametrize("hook", [None, lambda row: None], ids=["plain", "hook"])
def test_core_tables_uuid_and_composite_keys(
    engine: sa.Engine, database_url: str, driver: str, hook: Any
) -> None:
    engine = sa.create_engine(databases.with_driver(database_url, driver), poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(
            sa.insert(objects), [{"id": uuid.uuid4(), "number": n} for n in range(25)]
        )
        rows = [{"device": d, "at": n, "value": n} for d in "ab" for n in range(13)]
        connection.execute(sa.insert(readings), rows)
    common = {"before_delete": hook, "batch_size": 10}
    assert Purge("objects", objects, where=objects.c.number < 24, **common).run(engine).rows == 24
    assert Purge("readings", readings, where=readings.c.at < 12, **common).run(engine).rows == 24
    with engine.connect() as connection:
        left = connection.execute(sa.select(readings.c.device, readings.c.at)).all()
    assert [tuple(row) for row in left] == [("a", 12), ("b", 12)]


def test_another_class_of_the_same_table_is_left_alone(engine: sa.Engine) -> None:
    with sa.orm.Session(engine) as session:
        session.add_all([Animal(), Cat(), Cat()])
        session.commit()
    assert Purge("cats", Cat, where=Cat.id > 0).run(engine).rows == 2
    with engine.connect() as connection:
        assert connection.scalars(sa.select(Animal.kind)).all() == ["animal"]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (Whale, {}, "more than one table"),
        (keyless, {}, "has no primary key"),
        (object(), {}, "neither a mapped class nor a Table"),
        (Document, {"key": ["idd"]}, "did you mean 'id'"),
        (Document, {"on_error": "ignore"}, "on_error must be"),
        (Document, {"batch_sise": 3}, "did you mean 'batch_size'"),
        (Document, {"batch_size": 0}, "at least 1"),
        (Document, {"mark": {"stat": "x"}}, "no column 'stat': did you mean 'status'"),
    ],
)
def test_what_cannot_work_is_refused(table: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Purge("documents", table, where=sa.true(), **options)


def test_partitioned_tables_in_a_schema(engine: sa.Engine) -> None:
    events = sa.Table(
        "events",
        sa.MetaData(schema="archive"),
        sa.Column("day", sa.Integer, primary_key=True),
        sa.Column("id", sa.Integer, primary_key=True),
    )
    with engine.begin() as connection:
        connection.exec_driver_sql("""
            CREATE SCHEMA archive;
            CREATE TABLE archive.events (day int, id int, PRIMARY KEY (day, id))
                   PARTITION BY LIST (day);
            CREATE TABLE archive.events_1 PARTITION OF archive.events FOR VALUES IN (1);
            CREATE TABLE archive.events_2 PARTITION OF archive.events FOR VALUES IN (2);
            INSERT INTO archive.events SELECT d, n FROM generate_series(1, 2) d,
                   generate_series(1, 15) n;
        """)
    for hook in (None, bool):
        sweep = Purge("events", events, where=events.c.id <= 10, batch_size=7, before_delete=hook)
        assert sweep.run(engine, max_batches=1).rows == 7
    assert sweep.run(engine).rows == 6
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(events)) == 10


def test_a_named_key_stands_in_for_a_primary_key(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(keyless), [{"number": n} for n in range(5)])
    sweep = Purge("keyless", keyless, where=keyless.c.number < 4, key=["number"], batch_size=2)
    assert sweep.run(engine).rows == 4
