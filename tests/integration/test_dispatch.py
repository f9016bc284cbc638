"""Dispatch: recorded in one transaction, published after it, relayed if nobody did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord, group

from celery_pgbarrier import faults, reaper, relay
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.embedded import EmbeddedBroker
from celery_pgbarrier.errors import DatabaseUnavailable, DispatchUnknown
from celery_pgbarrier.store import sql
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker, workers
from tests.support.tables import Tables
from tests.support.tasks import (
    add,
    echo,
    fail,
    hooked,
    identity,
    noted,
    noted_error,
    notes,
    replaced,
    xsum,
)  # fmt: skip
from tests.support.wire import Wire
from tests.support.workers import environment

ROOT = Path(__file__).parents[2]
Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]


def canvas() -> Any:
    inner = chord([add.s(1, 1), add.s(2, 2)], xsum.s())
    return chord([inner, add.s(1, 1) | add.s(1), group(add.s(3, 3), add.s(4, 4))], xsum.s())


CANVAS_VALUE = 6 + 3 + 6 + 8


# -- one transaction


def test_a_chord_is_one_transaction(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire
) -> None:
    """Barriers, members, expected steps and messages; then it is said that they are published."""
    app = make_app(redis_broker, databases.backend_url(wire.url))
    assert app.backend.get_state("warm") == "PENDING"
    wire.said.clear()
    canvas().delay()
    said = [text.split()[0].rstrip(";") for text in wire.said if not text.startswith("SET ")]
    assert said.count("BEGIN") == 1
    assert said.index("BEGIN") == 0
    end = said.index("COMMIT")
    assert set(said[1:end]) <= {"INSERT", "WITH", "UPDATE", "SELECT"}
    assert said[end + 1 :] == ["SELECT", "DELETE"], "first steps are marked, barriers confirmed"


def test_the_statements_of_a_dispatch_do_not_grow_with_its_members(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire
) -> None:
    app = make_app(redis_broker, databases.backend_url(wire.url))
    assert app.backend.get_state("warm") == "PENDING"
    counts = []
    for size in (2, 500):
        wire.said.clear()
        chord([add.s(1, 1) for _ in range(size)], xsum.s()).delay()
        counts.append(len(wire.said))
    assert counts[0] == counts[1]


def test_a_chord_takes_five_statements(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire
) -> None:
    """The barrier with its slots, a batch of members, the word that they were published."""
    app = make_app(redis_broker, databases.backend_url(wire.url))
    assert app.backend.get_state("warm") == "PENDING"
    wire.said.clear()
    chord([add.s(1, 1) for _ in range(500)], xsum.s()).delay()
    said = [text.split()[0].rstrip(";") for text in wire.said]
    assert said == ["BEGIN", "SELECT", "WITH", "COMMIT", "DELETE"]


def test_members_carry_a_stub_of_their_body(
    app: Celery, worker: InlineWorker, tables: Tables, hook: Hook, tmp_path: Path
) -> None:
    """A large body is recorded once, and runs whole; members add and replace as ever."""
    path = str(tmp_path / "linked")
    large = {"keyword": "x" * 100_000}
    hook("adds")(lambda task, value: task.add_to_chord(add.si(10, 10)) and None)
    body = echo.s(**large).set(link=[noted.si("linked", path)])
    header = [add.s(1, 1), hooked.s(2, "adds"), replaced.s(add.s(3, 0)), add.s(2, 2) | add.s(0)]
    result = chord(header, body).delay()
    sizes = tables.ask("SELECT length(message) FROM pgbarrier_task WHERE message IS NOT NULL")
    assert len(sizes) == 4
    assert max(size for (size,) in sizes) < 3000
    assert tables.value("SELECT length(body) FROM pgbarrier_barrier") > 100_000
    worker.drain()
    value = result.get(timeout=5)
    assert value["kwargs"] == large
    assert sorted(value["args"][0]) == [2, 2, 3, 4, 20]
    assert notes(path) == ["linked"]


def test_a_stubs_chord_that_fails_calls_the_errbacks_of_the_body(
    worker: InlineWorker, tmp_path: Path
) -> None:
    path = str(tmp_path / "errors")
    body = xsum.s().set(link_error=[noted_error.s(path)])
    result = chord([add.s(1, 1), fail.s() | add.s(1)], body).delay()
    worker.drain()
    assert result.state == "FAILURE"
    assert notes(path) == [result.id]


def test_a_barrier_is_committed_before_anything_is_published(
    app: Celery, redis_broker: Broker, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((tables.count("task"), redis_broker.depth()))

    monkeypatch.setattr(
        faults,
        "_armed",
        dict.fromkeys(("dispatch.captured", "dispatch.committed"), (look, None)),
    )
    chord([add.s(1, 1), add.s(2, 2)], xsum.s()).delay()
    assert seen == [(0, 0), (2, 0)]
    assert redis_broker.depth() == 2


@pytest.mark.parametrize(
    ("point", "rows", "messages"),
    [("dispatch.captured", 0, 0), ("dispatch.committed", 9, 0), ("dispatch.half-published", 9, 1)],
)
def test_a_producer_that_is_killed(
    app: Celery, backend: BarrierBackend, redis_broker: Broker, database_url: str,
    worker: InlineWorker, tables: Tables, tmp_path: Path, point: str, rows: int, messages: int,
) -> None:  # fmt: skip
    """Everything is there or nothing; what is there completes although nobody published it."""
    path = tmp_path / "sums"
    code = (
        "from celery import chord\nfrom tests.support.app import app\n"
        "from tests.support.tasks import add, noted, xsum\n"
        f"body = xsum.s() | noted.s({str(path)!r})\n"
        "chord([add.s(n, n) for n in range(9)], body).delay()\n"
    )
    env = {
        **os.environ,
        **environment(redis_broker, databases.backend_url(database_url)),
        faults.VARIABLE: f"{point}=kill",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tables.count("task"), redis_broker.depth()) == (rows, min(messages, 9) if rows else 0)
    tables.overdue()
    reaper.run_once(backend)
    worker.drain()
    assert notes(path) == (["72"] if rows else [])
    assert tables.count("task", "state <> 'done'") == 0


def abandon(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Call a chord whose producer dies between its commit and its publication."""
    canvas = chord([add.s(n, n) for n in range(size)], xsum.s())
    with monkeypatch.context() as armed:
        armed.setattr(faults, "_armed", {"dispatch.committed": (faults._raise, None)})
        with pytest.raises(faults.InjectedFault):
            canvas.delay()


def test_members_that_a_dead_producer_recorded_are_published_once(
    app: Celery, backend: BarrierBackend, redis_broker: Broker, tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What was claimed meanwhile, or came to its end, is left alone."""
    size, held = 25, 3
    abandon(monkeypatch, size)
    assert tables.count("dispatch") == 1
    assert reaper.run_once(backend).messages_published == 0, "a grace for its producer"
    tables.ask(
        "UPDATE pgbarrier_task SET state = 'running', worker = gen_random_uuid(), due_at = NULL"
        " WHERE position < :held RETURNING 1",
        held=held,
    )
    tables.ask("UPDATE pgbarrier_dispatch SET due_at = clock_timestamp()")
    assert relay.publish_interrupted(backend) == redis_broker.depth() == size - held
    assert tables.count("dispatch") == 0
    assert tables.count("task", "publications = 1") == size - held
    assert relay.publish_interrupted(backend) == 0


def test_the_messages_of_a_large_chord_are_marked_batch_by_batch(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str, tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """So that of one whose producer dies in the middle only the rest is published again."""
    size = 25
    url = databases.backend_url(database_url)
    app = make_app(redis_broker, url, pgbarrier_batch_size=10)
    abandon(monkeypatch, size)
    assert tables.count("task", "published_at IS NULL") == size
    assert tables.count("dispatch") == 0
    tables.overdue()
    assert reaper.run_once(app.backend).messages_published == size
    tables.ask("DELETE FROM pgbarrier_task")
    redis_broker.purge()
    chord([add.s(n, n) for n in range(size)], xsum.s()).delay()
    marks = "SELECT count(DISTINCT date_trunc('millisecond', published_at)) FROM pgbarrier_task"
    assert tables.count("task", "published_at IS NULL") == tables.count("dispatch") == 0
    assert tables.value(marks) >= 2


def test_the_reaper_does_not_try_a_broker_that_is_away_for_each_chord(
    own_redis: EmbeddedBroker, own_broker: Broker, database_url: str, tables: Tables,
    make_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    app = make_app(own_broker, databases.backend_url(database_url))
    for _ in range(3):
        abandon(monkeypatch, 2)
    tables.overdue()
    own_redis.stop()
    assert relay.publish_interrupted(app.backend) == 0
    assert tables.count("dispatch") == 2, "it stopped at the first"
    assert tables.count("task", "published_at IS NULL") == 2
    own_redis.start()
    tables.overdue()
    assert reaper.run_once(app.backend).messages_published == 6
    assert own_broker.depth() == 6


def test_a_late_confirmation_is_none_of_a_later_call(
    app: Celery, backend: BarrierBackend, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its producer was paused, and the ids are used again."""
    abandon(monkeypatch, 2)
    barrier_id = tables.value("SELECT barrier_id FROM pgbarrier_dispatch")
    for call, left in (("gen_random_uuid()", 1), ("call", 0)):
        calls = tables.value(f"SELECT ARRAY[{call}] FROM pgbarrier_dispatch")
        parameters = {"ids": [barrier_id], "calls": [str(value) for value in calls]}
        backend.database.count(sql.DISPATCH_DONE, parameters)
        assert tables.count("dispatch") == left


def test_what_was_published_is_not_published_again_by_the_reaper(
    app: Celery, backend: BarrierBackend, redis_broker: Broker, tables: Tables
) -> None:
    """Recorded as published, and confirmed by the end of the call."""
    canvas().delay()
    depth = redis_broker.depth()
    assert depth == tables.count("task", "published_at IS NOT NULL") == 5
    assert tables.count("dispatch") == 0
    tables.ask("UPDATE pgbarrier_barrier SET created_at = created_at - interval '1 day'")
    assert reaper.run_once(backend).messages_published == 0
    assert redis_broker.depth() == depth


def test_a_confirmation_that_is_lost_costs_copies(
    app: Celery, backend: BarrierBackend, worker: InlineWorker, tables: Tables, tmp_path: Path
) -> None:
    """The server crashed before it flushed that all is published: each member still runs once."""
    path = str(tmp_path / "runs")
    result = chord([noted.s(n, path) for n in range(4)], xsum.s()).delay()
    tables.ask(
        "INSERT INTO pgbarrier_dispatch (barrier_id, call, due_at)"
        " VALUES (:id, gen_random_uuid(), clock_timestamp())",
        id=result.parent.id,
    )
    assert reaper.run_once(backend).messages_published == 4
    worker.drain()
    assert sorted(notes(path)) == ["0", "1", "2", "3"]
    assert result.get(timeout=5) == 6
    assert tables.count("dispatch") == 0


# -- the broker is away


def test_a_chord_is_submitted_while_the_broker_is_down(
    own_redis: EmbeddedBroker, own_broker: Broker, database_url: str, tables: Tables,
    make_app: Callable[..., Celery],
) -> None:  # fmt: skip
    app = make_app(own_broker, databases.backend_url(database_url))
    assert app.backend is not None
    own_redis.stop()
    result = canvas().delay()
    assert tables.count("task", "state = 'queued'") == 5
    assert tables.count("task", "published_at IS NOT NULL") == 0
    assert tables.count("dispatch") == 0
    assert reaper.run_once(app.backend).messages_published == 0  # a grace for its publisher
    tables.overdue()
    assert reaper.run_once(app.backend).messages_published == 0
    own_redis.start()
    tables.overdue()
    assert reaper.run_once(app.backend).messages_published == 5
    with workers(app, own_broker) as make:
        make().drain()
    assert result.get(timeout=5) == CANVAS_VALUE


def test_a_run_ends_while_the_broker_is_down(
    own_redis: EmbeddedBroker, own_broker: Broker, database_url: str, tables: Tables,
    make_app: Callable[..., Celery], hook: Hook, tmp_path: Path,
) -> None:  # fmt: skip
    """Its link and its body are recorded with its outcome, and sent when the broker is back."""
    app = make_app(own_broker, databases.backend_url(database_url))
    path = str(tmp_path / "linked")

    @hook("stop the broker")
    def stop(task: Any, value: Any) -> None:
        own_redis.stop()

    member = hooked.s(1, "stop the broker").set(link=noted.s(path))
    result = chord([member], identity.s()).delay()
    with workers(app, own_broker) as make:
        worker = make()
        worker.step()
        assert tables.barrier_states() == ["released"]
        own_redis.start()
        tables.overdue()
        assert reaper.run_once(app.backend).messages_published == 2
        worker.drain()
    assert result.get(timeout=5) == [1]
    assert notes(path) == ["1"]


# -- the database is away


def test_a_call_that_cannot_be_recorded_raises_and_leaves_nothing(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire, tables: Tables
) -> None:
    app = make_app(redis_broker, databases.backend_url(wire.url), pgbarrier_dispatch_timeout=0.2)
    assert app.backend.get_state("warm") == "PENDING"
    wire.break_off()
    with pytest.raises(DatabaseUnavailable):
        canvas().delay()
    assert (tables.count("task"), tables.count("barrier"), redis_broker.depth()) == (0, 0, 0)


def test_a_lost_answer_to_commit_is_looked_up(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire, tables: Tables
) -> None:
    """The barrier is found on a new connection: the call succeeds, everything is sent once."""
    app = make_app(redis_broker, databases.backend_url(wire.url))
    assert app.backend.get_state("warm") == "PENDING"
    wire.cut("COMMIT")
    result = canvas().delay()
    assert wire.was_cut
    assert redis_broker.depth() == 5
    assert tables.count("barrier") == 2
    with workers(app, redis_broker) as make:
        assert make().drain() == 8
    assert result.get(timeout=5) == CANVAS_VALUE


def test_a_lost_answer_to_commit_that_cannot_be_looked_up_is_said(
    make_app: Callable[..., Celery], redis_broker: Broker, wire: Wire, tables: Tables,
    database_url: str,
) -> None:  # fmt: skip
    """DispatchUnknown names the chord; here it is whole, and completes."""
    settings = {"pgbarrier_dispatch_timeout": 0.3}
    app = make_app(redis_broker, databases.backend_url(wire.url), **settings)
    assert app.backend.get_state("warm") == "PENDING"
    wire.cut("COMMIT", stay=True)
    with pytest.raises(DispatchUnknown) as error:
        chord([add.s(1, 1), add.s(2, 2)], xsum.s().set(task_id="the-body")).delay()
    (row,) = tables.ask("SELECT id FROM pgbarrier_barrier")
    assert row.id in str(error.value)
    assert redis_broker.depth() == 0
    app = make_app(redis_broker, databases.backend_url(database_url))
    tables.overdue()
    assert reaper.run_once(app.backend).messages_published == 2
    with workers(app, redis_broker) as make:
        make().drain()
    assert app.AsyncResult("the-body").get(timeout=5) == 6


# -- reapers


def test_reapers_at_once_do_no_harm(
    app: Celery, backend: BarrierBackend, worker: InlineWorker, redis_broker: Broker,
    tables: Tables, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Six passes race over unpublished messages: each message is sent once."""
    monkeypatch.setattr(faults, "_armed", {"dispatch.committed": (faults._raise, None)})
    for _ in range(30):
        with pytest.raises(faults.InjectedFault):
            chord([add.s(n, n) for n in range(10)], xsum.s()).delay()
    monkeypatch.undo()
    tables.overdue()
    start, counts, errors = threading.Barrier(6), [], []

    def pass_once() -> None:
        start.wait(30)
        try:
            counts.append(reaper.run_once(backend).messages_published)
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=pass_once) for _ in range(6)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert errors == []
    assert sum(counts) == redis_broker.depth() == 300
    worker.drain()
    assert tables.barrier_states() == ["released"] * 30
    results = tables.count("task", "state = 'done' AND barrier_id IS NULL")
    assert results == 30, "every body ran once"


@pytest.mark.parametrize("point", ["reap.advanced", "reap.released"])
def test_a_reaper_that_is_killed_in_the_middle_is_made_up_for(
    app: Celery, backend: BarrierBackend, make_worker: Callable[..., InlineWorker],
    redis_broker: Broker, database_url: str, tables: Tables, tmp_path: Path, point: str,
) -> None:  # fmt: skip
    """It has taken messages up, or released a claim, and publishes nothing any more."""
    path = str(tmp_path / "runs")
    result = chord([noted.s(1, path), noted.s(2, path)], xsum.s()).delay()
    worker = make_worker("dies")
    first = worker.take()
    redis_broker.purge()
    if point == "reap.released":
        claimed = first.id
        tables.ask(
            "UPDATE pgbarrier_task SET state = 'running', token = gen_random_uuid(), attempt = 1,"
            " worker = gen_random_uuid(), due_at = NULL WHERE id = :id",
            id=claimed,
        )
    tables.overdue()
    command = "-m celery -A tests.support.app pgbarrier reap --once"
    env = {
        **os.environ,
        **environment(redis_broker, databases.backend_url(database_url)),
        faults.VARIABLE: f"{point}=kill",
    }
    argv = [sys.executable, *command.split()]
    done = subprocess.run(argv, cwd=ROOT, env=env, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    last = make_worker("goes on")
    for _ in range(6):
        tables.overdue()
        reaper.run_once(backend)
        last.drain()
    assert result.get(timeout=5) == 3
    assert sorted(notes(path)) == ["1", "2"]


def test_a_finisher_that_dies_before_the_release_is_made_up_for(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    result = chord([add.s(1, 1)], xsum.s()).delay()
    monkeypatch.setattr("celery_pgbarrier.barrier.follow", lambda *_: None)
    worker.step()
    monkeypatch.undo()
    assert tables.barrier_states() == ["ready"]
    assert reaper.run_once(backend).barriers_released == 0  # a grace for its finisher
    tables.overdue()
    assert reaper.run_once(backend).barriers_released == 1
    worker.drain()
    assert result.get(timeout=5) == 2


@pytest.mark.settings(pgbarrier_batch_size=10)
def test_a_pass_goes_in_batches(
    backend: BarrierBackend, worker: InlineWorker, redis_broker: Broker, tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(faults, "_armed", {"dispatch.committed": (faults._raise, None)})
    with pytest.raises(faults.InjectedFault):
        chord([add.s(n, n) for n in range(55)], xsum.s()).delay()
    monkeypatch.undo()
    tables.overdue()
    assert reaper.run_once(backend).messages_published == 55
    assert redis_broker.depth() == 55
    worker.drain()
    assert tables.barrier_states() == ["released"]


def test_one_worker_takes_the_turn_of_an_interval(backend: BarrierBackend) -> None:
    assert [reaper.take_turn(backend, 60) for _ in range(3)] == [True, False, False]


def test_a_backlog_is_probed_and_not_sent_again(
    backend: BarrierBackend, redis_broker: Broker, tables: Tables, worker: InlineWorker
) -> None:
    """40 messages are overdue because nobody works: one probe goes out, not 40 copies."""
    result = chord([add.s(n, n) for n in range(40)], xsum.s()).delay()
    for _ in range(3):
        tables.ask("UPDATE pgbarrier_task SET due_at = due_at - interval '1 day'")
        reaper.run_once(backend)
    assert redis_broker.depth() <= 45
    worker.drain()
    assert result.get(timeout=5) == sum(2 * n for n in range(40))
