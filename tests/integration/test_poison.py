"""Poison: kept, announced, listed, put back by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord
from click.testing import CliRunner
from kombu.exceptions import ContentDisallowed

from celery_pgbarrier import (
    DispatchConflict,
    MessageUnreadable,
    NotPoisoned,
    TaskCrashed,
    lease,
    poison,
    reaper,
    task_poisoned,
)
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.cli import pgbarrier
from celery_pgbarrier.unit import Poison
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import add, hooked, identity, noted, noted_error, notes, xsum
from tests.support.waiting import wait_until

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]
MakeWorker = Callable[..., InlineWorker]

pytestmark = pytest.mark.settings(pgbarrier_max_crashes=2)


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


@pytest.fixture
def announced() -> Iterator[list[tuple[str, str]]]:
    """What the signal told: id and reason."""
    heard: list[tuple[str, str]] = []

    def hear(task_id: str, reason: str, **_: Any) -> None:
        heard.append((task_id, reason))

    task_poisoned.connect(hear)
    yield heard
    task_poisoned.disconnect(hear)


class Killer:
    """Lets the worker that runs a hooked task die: its claim stays, and it falls silent."""

    def __init__(self, backend: BarrierBackend, tables: Tables, worker: InlineWorker) -> None:
        self.backend, self.tables, self.worker = backend, tables, worker

    def crash(self, task_id: str, times: int = 2) -> None:
        """A process of the worker claims the task and dies, so many times."""
        for _ in range(times):
            row = self.tables.task(task_id)
            with self.worker.identity():
                claimed = lease.Claim(task_id, lease.Stamp(str(row.call), row.seq, True), row.name)
                _, attempt = lease.claim(self.backend, claimed)
                assert attempt is not None, row
            assert self.settle(task_id)

    def settle(self, task_id: str) -> bool:
        """Do what the reaper does with the claim of a process that is gone."""
        (row,) = self.tables.ask(
            "SELECT id, CAST(token AS text) AS token, CAST(worker AS text) AS worker, pid, rerun, "
            "name, CAST(call AS text) AS call, seq FROM pgbarrier_task WHERE id = :id",
            id=task_id,
        )
        return reaper.settle_claim(self.backend, row, True, reaper.Counts())


@pytest.fixture
def killer(backend: BarrierBackend, tables: Tables, worker: InlineWorker) -> Killer:
    return Killer(backend, tables, worker)


def test_a_poison_member_is_kept_announced_and_listed(
    app: Celery, backend: BarrierBackend, worker: InlineWorker, tables: Tables, killer: Killer,
    announced: list[tuple[str, str]], tmp_path: Path,
) -> None:  # fmt: skip
    """Its chord's errbacks fire once; another chord goes on undisturbed."""
    errors = str(tmp_path / "errors")
    body = xsum.s().set(link_error=[noted_error.s(errors)])
    result = chord([add.s(1, 1), add.s(2, 2)], body).delay()
    other = chord([add.s(3, 3)], xsum.s()).delay()
    bad = result.parent.results[0].id
    killer.crash(bad)
    worker.drain()
    reaper.run_once(backend)
    worker.drain()

    assert isinstance(app.AsyncResult(bad).result, TaskCrashed)
    assert result.state == "FAILURE"
    assert notes(errors) == [result.id]
    assert other.get(timeout=5) == 6
    assert [task_id for task_id, _ in announced] == [bad]
    assert "died with its process 2 times" in announced[0][1]
    (kept,) = poison.listed(backend)
    assert (kept.id, kept.name, kept.crashes, kept.barrier_state) == (
        bad, add.name, 1, "failed",
    )  # fmt: skip
    shown = CliRunner().invoke(pgbarrier, ["poison", "list"], obj=_Context(app))
    assert shown.exit_code == 0
    assert bad in shown.output
    assert "chord failed" in shown.output


def test_monitors_are_told_by_the_event_of_a_failed_task(
    app: Celery, backend: BarrierBackend
) -> None:
    seen: list[dict[str, Any]] = []
    receivers: list[Any] = []

    def listen() -> None:
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"task-failed": hear})
            receivers.append(receiver)
            receiver.capture(limit=None, timeout=60, wakeup=False)

    def hear(event: dict[str, Any]) -> None:
        seen.append(event)
        receivers[0].should_stop = True

    listener = threading.Thread(target=listen)
    listener.start()

    def heard() -> bool:  # what is sent before Redis knows of the listener is sent to nobody
        poison.announce(backend, Poison("some-id", "some.task", "it is deadly"))
        return bool(seen)

    wait_until(heard, 60, "the event arrives")
    listener.join(60)
    assert (seen[0]["uuid"], seen[0]["exception"]) == ("some-id", "it is deadly")


def test_a_member_put_back_in_time_completes_its_chord(
    app: Celery, worker: InlineWorker, tables: Tables, killer: Killer
) -> None:
    """The chord still waited for others: the member counts again, whichever slot it was in."""
    result = chord([add.s(n, n) for n in range(5)], xsum.s()).delay()
    bad = [member.id for member in result.parent.results[1:4]]
    for task_id in bad:
        killer.crash(task_id)
    done = CliRunner().invoke(pgbarrier, ["poison", "retry", *bad], obj=_Context(app))
    assert done.exit_code == 0, done.output
    assert done.output.count("its chord waits for it") == 3
    worker.drain()
    assert result.get(timeout=5) == 20
    assert tables.count("poison") == 0
    assert tables.count("slot", "remaining <> 0") == 0
    assert [tables.task(task_id).crashes for task_id in bad] == [0, 0, 0]


def test_a_member_of_a_failed_chord_runs_by_itself(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, killer: Killer, tmp_path: Path
) -> None:
    """Its links and the next steps of its chain run; the chord stays failed."""
    path, linked = str(tmp_path / "steps"), str(tmp_path / "links")
    head = add.s(1, 1).set(link=noted.s(linked))
    result = chord([chain(head, noted.s(path)), add.s(2, 2)], identity.s()).delay()
    bad = result.parent.results[0].parent.id
    killer.crash(bad)
    with pytest.raises(DispatchConflict, match="later step"):
        poison.retry(backend, bad)
    worker.drain()
    assert result.state == "FAILURE"

    assert poison.retry(backend, bad) == poison.Retried(bad, False)
    worker.drain()
    assert (notes(path), notes(linked)) == (["2"], ["2"])
    assert result.state == "FAILURE"
    assert tables.barrier_states() == ["failed"]
    assert tables.count("task", "state <> 'done'") == 0


def test_what_is_not_kept_cannot_be_put_back(
    app: Celery, backend: BarrierBackend, worker: InlineWorker
) -> None:
    result = add.delay(1, 1)
    worker.drain()
    with pytest.raises(NotPoisoned, match="poison list"):
        poison.retry(backend, result.id)
    done = CliRunner().invoke(pgbarrier, ["poison", "retry", "nobody"], obj=_Context(app))
    assert done.exit_code == 1
    assert "1 of 1 not put back" in done.output


def test_a_task_outside_any_chord_is_put_back_too(
    backend: BarrierBackend, worker: InlineWorker, killer: Killer, hook: Hook
) -> None:
    """An unrecorded task stores its message with its claim, so that is kept as well."""
    runs: list[int] = []

    @hook("die")
    def die(task: Any, value: Any) -> str:
        runs.append(1)
        if len(runs) <= 2:
            assert killer.settle(task.request.id)
            raise KeyError("a process that is dead stores nothing")
        return "alive"

    result = hooked.delay(1, "die")
    worker.drain()
    assert (len(runs), result.state) == (2, "FAILURE")
    assert isinstance(result.result, TaskCrashed)
    assert not poison.retry(backend, result.id).rejoined
    worker.drain()
    assert backend.get_result(result.id) == "alive"


def test_what_is_kept_expires(backend: BarrierBackend, killer: Killer, tables: Tables) -> None:
    result = chord([add.s(1, 1), add.s(2, 2)], xsum.s()).delay()
    killer.crash(result.parent.results[0].id)
    tables.ask("UPDATE pgbarrier_poison SET expires_at = clock_timestamp() - interval '1 s'")
    reaper.purge(backend)
    assert tables.count("poison") == 0


# -- hazard 23


@pytest.mark.settings(task_serializer="json")
def test_hazard_23_a_message_that_a_worker_cannot_read_fails_its_task(
    app: Celery, backend: BarrierBackend, redis_broker: Broker, worker: InlineWorker,
    tables: Tables, announced: list[tuple[str, str]], tmp_path: Path,
) -> None:  # fmt: skip
    """Celery only logs it. The chord fails at once, and the member can be put back."""
    errors = str(tmp_path / "errors")
    body = xsum.s().set(link_error=[noted_error.s(errors)])
    result = chord([add.s(1, 1).set(serializer="pickle"), add.s(2, 2)], body).delay()
    bad = result.parent.results[0].id
    reads = 0
    for _ in range(10):
        try:
            if worker.step() is None:
                break
            reads += 1
        except ContentDisallowed:
            continue
    assert isinstance(app.AsyncResult(bad).result, MessageUnreadable)
    assert result.state == "FAILURE"
    assert notes(errors) == [result.id]
    assert [task_id for task_id, _ in announced] == [bad]
    assert [row.id for row in poison.listed(backend)] == [bad]


class _Context:
    """What Celery hands to its subcommands."""

    def __init__(self, app: Celery) -> None:
        self.app = app
