"""Revive: stuck rows are stamped and their messages recorded in one transaction."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, chain
from sqlalchemy.orm import Session

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps import Counts, Revive, Rule, Stop
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.tables import Tables
from tests.sweeps.models import Job

STAMP = {"published_at": sa.func.now(), "attempts": Job.attempts + 1}


def unpublished(now: Any) -> Any:
    return (Job.state == "queued") & (
        Job.published_at.is_(None) | (Job.published_at < now - timedelta(minutes=5))
    )


def lost(**options: Any) -> Rule:
    return Rule("lost", unpublished, STAMP, "test.identity", lambda job: (job.id,), **options)


def fill(engine: sa.Engine, count: int, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(Job.__table__), [{"state": "queued", **values}] * count)


def attempts(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(Job.attempts).order_by(Job.id)))


def test_a_task_is_sent_for_each(
    engine: sa.Engine, app: Celery, redis_broker: Broker, database_url: str
) -> None:
    fill(engine, 25)
    sweep = Revive("jobs", Job, rules=[lost()], batch_size=10)
    sweep.register(app)
    counts = sweep.run(engine)
    assert (counts.batches, counts.rows, counts.left, counts.rules) == (3, 25, 0, {"lost": 25})
    assert redis_broker.depth() == 25
    assert Tables(database_url).count("task", "state = 'queued' AND published_at IS NOT NULL") == 25
    assert attempts(engine) == [1] * 25
    assert sweep.run(engine).rows == 0, "the threshold has not passed again"


def test_rules_have_thresholds_and_counts_of_their_own(
    engine: sa.Engine, app: Celery, redis_broker: Broker
) -> None:
    fill(engine, 2)
    fill(
        engine,
        3,
        state="running",
    )
    with engine.begin() as connection:
        connection.execute(sa.insert(Job), [{"state": "running"}] * 4)
        over = sa.update(Job).where(Job.state == "running", Job.id <= 5)
        connection.execute(over.values(lease_until=sa.func.now() - timedelta(hours=1)))
        connection.execute(sa.update(Job).where(Job.id == 5).values(attempts=9))
    dead = lambda now: (Job.state == "running") & (Job.lease_until < now)  # noqa: E731
    again = {"state": "queued", "published_at": sa.func.now()}
    sweep = Revive(
        "jobs",
        Job,
        rules=[
            Rule("spent", lambda now: dead(now) & (Job.attempts >= 5), {"state": "failed"}),
            Rule("dead", dead, again, "test.echo", kwargs=lambda job: {"job": job.id}),
            lost(options={"queue": redis_broker.queue, "priority": 3}),
        ],
    )
    expected = sweep.dry_run(engine, app=app)
    assert expected.rules == {"spent": 1, "dead": 3, "lost": 2}
    counts = sweep.run(engine, app=app)
    assert counts.rules == {"spent": 1, "dead": 2, "lost": 2}
    assert redis_broker.depth() == 4


def test_one_row_that_cannot_be_sent_does_not_block_the_others(
    engine: sa.Engine, app: Celery, redis_broker: Broker
) -> None:
    fill(engine, 5)

    def args(job: Job) -> tuple[Any]:
        if job.id == 3:
            raise LookupError("no file for job 3")
        return (object(),) if job.id == 4 else (job.id,)

    rule = Rule("lost", unpublished, STAMP, "test.identity", args)
    counts = Revive("jobs", Job, rules=[rule]).run(engine, app=app)
    assert (counts.rows, counts.failed, counts.left) == (3, 2, 2)
    assert [failure.key for failure in counts.failures] == [(3,), (4,)]
    assert attempts(engine) == [1, 1, 0, 0, 1]
    assert redis_broker.depth() == 3


def test_a_row_that_refuses_its_stamp_gets_no_message(
    engine: sa.Engine, app: Celery, redis_broker: Broker, database_url: str
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs ADD CHECK (id <> 3 OR attempts < 1)")
    fill(engine, 5)
    counts = Revive("jobs", Job, rules=[lost()]).run(engine, app=app)
    assert (counts.rows, counts.failed) == (4, 1)
    assert (redis_broker.depth(), Tables(database_url).count("task")) == (4, 4)


def test_a_task_id_that_is_in_use_fails_alone(
    engine: sa.Engine, app: Celery, redis_broker: Broker
) -> None:
    fill(engine, 3)
    rule = lost(options=lambda job: {"task_id": f"job-{job.id % 2}"})
    counts = Revive("jobs", Job, rules=[rule], batch_size=1).run(engine, app=app)
    assert (counts.rows, counts.failed) == (2, 1)
    assert "DispatchConflict" in counts.failures[0].error


def test_the_broker_is_down(
    engine: sa.Engine, make_app: Callable[..., Celery], database_url: str
) -> None:
    nowhere = Broker("redis://127.0.0.1:1/0", "celery")
    app = make_app(nowhere, databases.backend_url(database_url))
    fill(engine, 3)
    counts = Revive("jobs", Job, rules=[lost()]).run(engine, app=app)
    assert (counts.rows, attempts(engine)) == (3, [1, 1, 1])
    recorded = "state = 'queued' AND published_at IS NULL AND due_at IS NOT NULL"
    assert Tables(database_url).count("task", recorded) == 3, "the reaper publishes them"


def test_stamp_and_message_are_one_transaction(
    engine: sa.Engine, app: Celery, redis_broker: Broker, database_url: str
) -> None:
    fill(engine, 3)
    tables, cut = Tables(database_url), []

    @sa.event.listens_for(engine, "commit")
    def commit(connection: sa.Connection) -> None:
        if not cut and connection.info.get("stamped"):
            cut.append(tables.count("task"))
            tables.ask("SELECT pg_terminate_backend(:pid)", pid=connection.info["stamped"])

    @sa.event.listens_for(engine, "after_cursor_execute")
    def executed(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE jobs"):
            pid = connection.connection.dbapi_connection.info.backend_pid
            connection.info["stamped"] = pid

    counts = Revive("jobs", Job, rules=[lost()]).run(engine, app=app)
    assert cut == [0]
    assert (counts.rows, redis_broker.depth(), tables.count("task")) == (3, 3, 3)
    assert attempts(engine) == [1, 1, 1]


@pytest.mark.parametrize("names", [("jobs", "jobs"), ("jobs", "others")])
def test_two_revivers_at_once_publish_once(
    engine: sa.Engine, app: Celery, redis_broker: Broker, names: tuple[str, str]
) -> None:
    """Of one name, one has the turn; of two names, each row is locked by one."""
    fill(engine, 200)
    gate, found = threading.Barrier(2), []

    def revive(name: str) -> None:
        sweep = Revive(name, Job, rules=[lost()], batch_size=7)
        gate.wait(10)
        found.append(sweep.run(engine, app=app))

    threads = [threading.Thread(target=revive, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(counts.rows for counts in found) == 200
    assert (redis_broker.depth(), attempts(engine)) == (200, [1] * 200)
    busy = [counts for counts in found if counts.stopped is Stop.BUSY]
    assert len(busy) == (1 if names[0] == names[1] else 0)


def test_a_rule_may_send_a_canvas(engine: sa.Engine, app: Celery, redis_broker: Broker) -> None:
    fill(engine, 2)

    def send(job: Job) -> None:
        first = app.signature("test.identity", (job.id,))
        chain(first, app.signature("test.add", (1,))).apply_async()

    counts = Revive("jobs", Job, rules=[Rule("lost", unpublished, STAMP, send=send)]).run(
        engine, app=app
    )
    assert (counts.rows, redis_broker.depth()) == (2, 2)


@pytest.mark.parametrize("hidden", ["session", "core"])
def test_rows_that_the_rules_get(engine: sa.Engine, app: Celery, hidden: str) -> None:
    fill(engine, 2)
    table: Any = Job if hidden == "session" else Job.__table__
    rows: list[Any] = []

    def args(job: Any) -> tuple[int]:
        rows.append(job)
        return (job.id,)

    rule = Rule("lost", unpublished, {"state": "sent"}, "test.identity", args)
    assert Revive("jobs", table, rules=[rule]).run(engine, app=app).rows == 2
    assert all(isinstance(row, Job) == (hidden == "session") for row in rows)
    assert not any(Session.object_session(row) for row in rows if isinstance(row, Job))


# -- what cannot work


def test_another_database_is_refused(bare_engine: sa.Engine, app: Celery) -> None:
    fill(bare_engine, 1)
    with pytest.raises(ConfigurationError, match="point result_backend at the database"):
        Revive("jobs", Job, rules=[lost()]).run(bare_engine, app=app)
    assert attempts(bare_engine) == [0]


def test_without_our_backend_it_is_refused(engine: sa.Engine) -> None:
    sweep = Revive("jobs", Job, rules=[lost()])
    with pytest.raises(ConfigurationError, match=r"call register\(app\)"):
        sweep.run(engine)
    other = Celery("other", broker="memory://", backend="cache+memory://", set_as_current=False)
    with pytest.raises(ConfigurationError, match="set result_backend to pgbarrier"):
        sweep.run(engine, app=other)
    other.close()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "needs rules"),
        ([lost(), lost()], "a name of its own"),
        ([Rule("lost", unpublished, {"attempts": Job.attempts + 1})], "values of rule lost"),
    ],
)
def test_rules_that_cannot_work(rules: list[Rule], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Revive("jobs", Job, rules=rules)


def test_rules_without_a_task_need_no_backend(bare_engine: sa.Engine) -> None:
    fill(bare_engine, 3)
    rule = Rule("old", Job.attempts == 0, {"state": "failed"})
    counts: Counts = Revive("jobs", Job, rules=[rule]).run(bare_engine)
    assert (counts.rows, counts.rules) == (3, {"old": 3})
