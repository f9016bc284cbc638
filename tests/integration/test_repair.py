"""Orphan 6: barriers whose count is wrong are recounted from their rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import chord
from celery.exceptions import ChordError
from sqlalchemy import create_engine, text

from celery_pgbarrier import reaper, repair
from celery_pgbarrier.backend import BarrierBackend
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import add, noted_error, notes, xsum


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


def unchecked(tables: Tables) -> None:
    """Let time pass until every barrier may be looked at again."""
    tables.ask("UPDATE pgbarrier_barrier SET checked_at = checked_at - interval '1 day'")


DAMAGE = {
    "a slot waits for one too many": "UPDATE pgbarrier_slot SET remaining = remaining + 1",
    "a slot waits for one too few": (
        "UPDATE pgbarrier_slot SET remaining = remaining - 1 WHERE remaining > 1"
    ),
    "slots are gone": "DELETE FROM pgbarrier_slot WHERE slot > 0",
    "a slot too many is open": "UPDATE pgbarrier_barrier SET open_slots = open_slots + 1",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_count_is_mended(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, damage: str
) -> None:
    result = chord([add.s(n, n) for n in range(9)], xsum.s()).delay()
    worker.step()
    tables.ask(DAMAGE[damage])
    unchecked(tables)
    assert reaper.run_once(backend).barriers_recounted == 1
    worker.drain()
    assert result.get(timeout=5) == 72
    assert tables.count("slot", "remaining <> 0") == 0


def test_a_barrier_that_was_counted_wrong_to_its_end_is_released(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    """All members have finished and it waits for ever: one pass recounts and releases it."""
    result = chord([add.s(n, n) for n in range(9)], xsum.s()).delay()
    tables.ask("UPDATE pgbarrier_slot SET remaining = remaining + 1 WHERE slot = 0")
    worker.drain()
    assert tables.barrier_states() == ["waiting"]
    unchecked(tables)
    assert reaper.run_once(backend).barriers_recounted == 1
    tables.overdue()
    assert reaper.run_once(backend).barriers_released == 1
    worker.drain()
    assert result.get(timeout=5) == 72


def test_a_chord_with_a_member_whose_row_is_gone_fails(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, tmp_path: Path
) -> None:
    """Its body must not run on fewer results than it asked for."""
    errors = str(tmp_path / "errors")
    body = xsum.s().set(link_error=[noted_error.s(errors)])
    result = chord([add.s(n, n) for n in range(4)], body).delay()
    gone = result.parent.results[2].id
    tables.ask("DELETE FROM pgbarrier_task WHERE id = :id", id=gone)
    worker.drain()
    unchecked(tables)
    reaper.run_once(backend)
    tables.overdue()
    reaper.run_once(backend)
    worker.drain()
    with pytest.raises(ChordError, match="rows of 1 of 4 members are gone"):
        result.get(timeout=5)
    assert notes(errors) == [result.id]


STRANDED = {
    "waits without a due time": "state = 'queued', due_at = NULL",
    "runs without a holder": "state = 'running', due_at = NULL, worker = NULL",
}


@pytest.mark.parametrize("how", STRANDED)
def test_a_member_that_nothing_touches_any_more_runs_again(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, how: str
) -> None:
    result = chord([add.s(n, n) for n in range(4)], xsum.s()).delay()
    worker.broker.purge()
    tables.ask(f"UPDATE pgbarrier_task SET {STRANDED[how]} WHERE state = 'queued'")
    unchecked(tables)
    assert reaper.run_once(backend).members_revived == 4
    worker.drain()
    assert result.get(timeout=5) == 12


def test_a_barrier_that_is_right_is_not_locked_and_not_looked_at_twice(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    chord([add.s(n, n) for n in range(9)], xsum.s()).delay()
    worker.step()
    unchecked(tables)
    engine = create_engine(tables.url)
    with engine.begin() as holder:
        holder.execute(text("SELECT * FROM pgbarrier_slot FOR UPDATE"))
        assert repair.check(backend) == repair.Mended()
    engine.dispose()
    assert tables.count("barrier", "checked_at > clock_timestamp() - interval '1 min'") == 1
    tables.ask("UPDATE pgbarrier_slot SET remaining = remaining + 1")
    assert repair.check(backend) == repair.Mended(), "not again for pgbarrier_republish_after"


def test_recounts_amid_finishers_change_nothing(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables
) -> None:
    """Six threads finish 120 members while two others recount without end."""
    result = chord([add.s(n, 1) for n in range(120)], xsum.s()).delay()
    worker.broker.purge()
    (row,) = tables.ask("SELECT id FROM pgbarrier_barrier")
    members = [member.id for member in result.parent.results]
    over = threading.Event()
    errors: list[Exception] = []

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def finish(ids: list[str]) -> None:
        for task_id in ids:
            backend.mark_as_done(task_id, 1)

    def recount() -> None:
        while not over.is_set():
            backend.database.transaction(partial(repair._recount, backend, row.id), 10.0)

    recounting = [guarded(recount) for _ in range(2)]
    finishing = [guarded(partial(finish, members[start::6])) for start in range(6)]
    for thread in finishing:
        thread.join(60)
    over.set()
    for thread in recounting:
        thread.join(60)
    assert errors == []
    worker.drain()
    assert result.get(timeout=10) == 120
    assert tables.count("slot", "remaining <> 0") == 0
    assert tables.value("SELECT open_slots FROM pgbarrier_barrier") == 0


def test_a_check_that_fails_stops_no_other(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [chord([add.s(n, n) for n in range(4)], xsum.s()).delay() for _ in range(2)]
    tables.ask("UPDATE pgbarrier_slot SET remaining = remaining + 1")
    unchecked(tables)
    recount, calls = repair._recount, []

    def failing(*args: Any) -> bool:
        calls.append(args)
        if len(calls) == 1:
            raise KeyError("the first one cannot be mended")
        return recount(*args)

    monkeypatch.setattr(repair, "_recount", failing)
    assert reaper.run_once(backend).barriers_recounted == 1
    unchecked(tables)
    assert reaper.run_once(backend).barriers_recounted == 1
    worker.drain()
    assert [result.get(timeout=5) for result in results] == [12, 12]
