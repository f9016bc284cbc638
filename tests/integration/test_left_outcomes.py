"""Outcomes that are left to the worker's clerk, with what follows from them, as it commits them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import chord, group, states

from celery_pgbarrier import ahead, barrier, batch, outbox, reaper
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.errors import DispatchConflict
from celery_pgbarrier.lease import Attempt
from celery_pgbarrier.unit import Unit
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import add, fail, identity, noted, notes, xsum
from tests.support.wire import Wire

MANY = 5
MESSAGES = "SELECT count(*) FROM pgbarrier_task WHERE state = 'queued'"


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


class Leaving:
    """A worker that runs what waits and leaves the outcomes, which are committed together."""

    def __init__(self, worker: InlineWorker) -> None:
        self.worker = worker
        self.left: list[Unit] = []
        self.ids: set[str] = set()

    def leave(self, unit: Unit, attempt: Attempt) -> bool:
        """Stands in for :func:`ahead.leave`: a pickle on its way between two processes."""
        self.ids.add(attempt.task_id)
        self.left.append(pickle.loads(pickle.dumps(unit)))
        return True

    def run(self) -> list[Unit]:
        """Run what waits; return what was left."""
        self.worker.drain()
        left, self.left = self.left, []
        return left

    def commit(self, units: list[Unit]) -> None:
        """What the clerk does with what it was left."""
        backend = self.worker.app.backend
        with self.worker.identity():
            batch.commit(backend, units, partial(barrier.follow, backend))

    def drain(self) -> None:
        """Run and commit until nothing waits."""
        while units := self.run():
            self.commit(units)


@pytest.fixture
def leaving(wired: InlineWorker, monkeypatch: pytest.MonkeyPatch) -> Leaving:
    leaving = Leaving(wired)
    monkeypatch.setattr(ahead, "leave", leaving.leave)
    monkeypatch.setattr(ahead, "has_left", leaving.ids.__contains__)
    return leaving


#: Chains by what they are part of, and what comes of MANY of them.
CANVASES: dict[str, Callable[[str], tuple[Any, Any]]] = {
    "chains": lambda path: (
        group(noted.s(n, path) | add.s(1) | add.s(1) for n in range(MANY)),
        [n + 2 for n in range(MANY)],
    ),
    "links": lambda path: (
        group(add.s(n, 1).set(link=noted.s(path)) for n in range(1, MANY + 1)),
        [n + 1 for n in range(1, MANY + 1)],
    ),
    "members": lambda path: (
        chord([noted.s(n, path) | add.s(1) for n in range(MANY)], xsum.s() | add.s(1)),
        sum(range(MANY)) + MANY + 1,
    ),
    "linked": lambda path: (
        chord([add.s(n, 0).set(link=noted.s(path)) for n in range(MANY)], xsum.s()),
        sum(range(MANY)),
    ),
}


@pytest.mark.parametrize("canvas", CANVASES)
def test_steps_and_links_follow_from_a_batch(
    leaving: Leaving, wire: Wire, tables: Tables, tmp_path: Path, canvas: str
) -> None:
    path = str(tmp_path / "runs")
    called, expected = CANVASES[canvas](path)
    result = called()
    units = leaving.run()
    assert len(units) == MANY
    wire.said.clear()
    leaving.commit(units)
    trips = 5  # BEGIN, outcomes, messages, COMMIT, their mark; then as many for a body
    assert len(wire.said) == (2 * trips if canvas == "linked" else trips)
    leaving.drain()
    assert result.get(timeout=5) == expected
    assert len(notes(path)) == MANY
    assert tables.count("task", "state <> 'done'") == 0
    assert tables.value("SELECT max(attempt) FROM pgbarrier_task") == 1


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("moment", ["finish", "pgbarrier_record_tasks", "COMMIT"])
def test_an_answer_that_is_lost_repeats_nothing(
    leaving: Leaving, wire: Wire, tables: Tables, tmp_path: Path, moment: str, canvas: str
) -> None:
    path = str(tmp_path / "runs")
    called, expected = CANVASES[canvas](path)
    result = called()
    units = leaving.run()
    finish = "pgbarrier_finish_members" if canvas == "linked" else "pgbarrier_finish_alones"
    wire.cut(finish if moment == "finish" else moment)
    leaving.commit(units)
    assert wire.was_cut
    if canvas == "linked":  # nobody heard that the barrier is ready
        tables.overdue()
        reaper.run_once(leaving.worker.app.backend)
    leaving.drain()
    assert result.get(timeout=5) == expected
    assert len(notes(path)) == MANY
    assert tables.count("task", "state <> 'done'") == 0


def test_what_follows_from_a_refused_outcome_is_not_sent(
    leaving: Leaving, tables: Tables, tmp_path: Path
) -> None:
    """Another process has taken one of the tasks over meanwhile."""
    path = str(tmp_path / "runs")
    result = group(add.s(n, 0) | noted.s(path) for n in range(MANY))()
    units = leaving.run()
    lost = result.results[2].parent.id
    tables.ask("UPDATE pgbarrier_task SET token = gen_random_uuid() WHERE id = :id", id=lost)
    leaving.commit(units)
    leaving.drain()
    assert sorted(notes(path)) == ["0", "1", "3", "4"]
    assert tables.task(lost).state == "running"
    assert result.results[2].state == states.PENDING


@pytest.mark.parametrize("left", [True, False], ids=["left", "own"])
def test_a_step_whose_id_runs_for_another_call_fails_its_task_only(
    leaving: Leaving, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """As it does where a process commits its own outcomes."""
    if not left:
        monkeypatch.setattr(ahead, "leave", lambda unit, attempt: False)
    path = str(tmp_path / "runs")
    queue = f"{leaving.worker.broker.queue}-nobody"
    other = chord([add.s(0, 0).set(task_id="taken", queue=queue)], identity.s())()
    seconds = [noted.s(path) for _ in range(MANY)]
    seconds[2].set(task_id="taken")
    results = [(add.s(n, 0) | second)() for n, second in enumerate(seconds)]
    with nullcontext() if left else pytest.warns(RuntimeWarning, match="outside body"):
        leaving.drain()
    assert sorted(notes(path)) == ["0", "1", "3", "4"]
    first = results[2].parent
    assert first.state == states.FAILURE
    with pytest.raises(DispatchConflict, match="taken"):
        first.get(timeout=5)
    assert tables.value(MESSAGES) == 1, "the other call's"
    leaving.worker.drain(queue=queue)
    leaving.drain()
    assert other.get(timeout=5) == [0]


@pytest.mark.parametrize("left", [True, False], ids=["left", "own"])
def test_two_tasks_of_a_batch_that_send_the_same_id(
    leaving: Leaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """The second fails, as it does where a process commits its own; the others are as they are."""
    if not left:
        monkeypatch.setattr(ahead, "leave", lambda unit, attempt: False)
    path = str(tmp_path / "runs")
    shared = noted.s(path).set(task_id="shared")
    results = [
        add.s(n, 0).set(link=shared if n in (1, 3) else noted.s(path)).delay() for n in range(MANY)
    ]
    with nullcontext() if left else pytest.warns(RuntimeWarning, match="outside body"):
        leaving.drain()
    assert [result.state for result in results].count(states.FAILURE) == 1
    assert results[3].state == states.FAILURE
    assert sorted(notes(path)) == ["0", "1", "2", "4"]


def test_an_outcome_that_cannot_be_stored_fails_alone(leaving: Leaving, tmp_path: Path) -> None:
    """PostgreSQL has no text with a NUL in it."""
    path = str(tmp_path / "runs")
    results = [(add.s(n, 0) | noted.s(path).set(task_id=f"{n}")).delay() for n in range(MANY)]
    units = leaving.run()
    (message,) = units[2].messages
    message.task_id = "2\0"
    first = units[2].primary
    assert first is not None
    leaving.commit(units)
    leaving.drain()
    assert sorted(notes(path)) == ["0", "1", "3", "4"]
    parents = {result.parent.id: result.parent for result in results}
    assert parents.pop(first.task_id).state == states.FAILURE
    assert {parent.state for parent in parents.values()} == {states.SUCCESS}


def test_a_late_mark_is_of_what_nobody_has_claimed(backend: BarrierBackend, tables: Tables) -> None:
    """A task that was claimed and put back has a message that is still to be published."""
    chord([add.s(n, n) for n in range(3)], xsum.s())()
    fresh, held, back = (row.id for row in tables.ask("SELECT id FROM pgbarrier_task"))
    tables.ask("UPDATE pgbarrier_task SET published_at = NULL,"
               " due_at = clock_timestamp() + interval '1 s'")  # fmt: skip
    tables.ask("UPDATE pgbarrier_task SET state = 'running', attempt = 1 WHERE id = :id", id=held)
    tables.ask("UPDATE pgbarrier_task SET attempt = 1 WHERE id = :id", id=back)
    outbox.mark_unclaimed(backend, [fresh, held, back])
    marked = tables.ask("SELECT id FROM pgbarrier_task WHERE published_at IS NOT NULL")
    assert [row.id for row in marked] == [fresh]
    assert tables.value("SELECT due_at > clock_timestamp() + interval '4 min'"
                        " FROM pgbarrier_task WHERE id = :id", id=fresh)  # fmt: skip


def test_a_batch_is_given_up_at_once_where_the_database_stays_away(
    leaving: Leaving, wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Not one outcome after the other, each with the patience of all: the tasks run again."""
    backend = leaving.worker.app.backend
    monkeypatch.setattr(backend, "_settings", replace(backend.settings, outcome_timeout=0.5))
    alone: list[str] = []
    monkeypatch.setattr(batch, "_commit_one", lambda *arguments: alone.append(arguments[1]))
    path = str(tmp_path / "runs")
    group(add.s(n, 0) | noted.s(path) for n in range(MANY))()
    units = leaving.run()
    wire.cut("COMMIT", stay=True)
    leaving.commit(units)
    assert alone == []
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "Outcomes are lost, their tasks run again"
    ]
    wire.mend()


def test_failures_and_canvases_are_not_left(leaving: Leaving) -> None:
    """They take what a pool process has: errbacks, the chord that follows, its members."""
    failed = fail.delay()
    followed = (add.s(1, 1) | group(add.s(1), add.s(2)) | xsum.s())()
    assert [leaving.worker.step() is None for _ in range(2)] == [False, False]
    assert leaving.left == []
    assert failed.state == states.FAILURE
    assert followed.parent is not None
    leaving.drain()
    assert followed.get(timeout=5) == 7
