"""One test's database, broker and application, and the questions it asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from celery import Celery, chord
from celery.result import AsyncResult
from sqlalchemy import Engine, Row, create_engine, text

from tests.acceptance.tasks import DATABASE, part, total
from tests.support.brokers import Broker
from tests.support.databases import backend_url, with_driver
from tests.support.waiting import wait_until
from tests.support.workers import BeatProcess, WorkerProcess, environment

#: Triggers keep what the rows went through: an outcome that is written twice is seen.
AUDIT = """
CREATE TABLE body_run (
    label text NOT NULL, total bigint NOT NULL, at timestamptz DEFAULT clock_timestamp());
CREATE TABLE task_history (
    id text, was text, became text, status text, token uuid, worker uuid, pid integer,
    crashes integer, at timestamptz DEFAULT clock_timestamp());
CREATE TABLE barrier_history (id text, became text, at timestamptz DEFAULT clock_timestamp());
CREATE FUNCTION audit_task() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO task_history (id, was, became, status, token, worker, pid, crashes) VALUES
        (NEW.id, CASE WHEN TG_OP = 'UPDATE' THEN OLD.state END, NEW.state, NEW.status,
         NEW.token, NEW.worker, NEW.pid, NEW.crashes);
    RETURN NULL;
END $$;
CREATE FUNCTION audit_barrier() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO barrier_history (id, became) VALUES (NEW.id, NEW.state);
    RETURN NULL;
END $$;
CREATE TRIGGER audit_new_task AFTER INSERT ON pgbarrier_task
    FOR EACH ROW EXECUTE FUNCTION audit_task();
CREATE TRIGGER audit_task AFTER UPDATE ON pgbarrier_task FOR EACH ROW
    WHEN (NEW.state <> OLD.state OR NEW.token IS DISTINCT FROM OLD.token
          OR NEW.last_token IS DISTINCT FROM OLD.last_token)
    EXECUTE FUNCTION audit_task();
CREATE TRIGGER audit_barrier AFTER UPDATE ON pgbarrier_barrier FOR EACH ROW
    WHEN (NEW.state <> OLD.state) EXECUTE FUNCTION audit_barrier();
"""

OPEN = """
SELECT 'barrier ' || id || ' is ' || state || ', open slots ' || open_slots AS line
  FROM pgbarrier_barrier WHERE state IN ('waiting', 'ready') OR open_slots <> 0
UNION ALL
SELECT 'slot ' || slot || ' of barrier ' || barrier_id || ': ' || remaining || ' remain'
  FROM pgbarrier_slot WHERE remaining <> 0
UNION ALL
SELECT format('task %s (%s) is %s, attempt %s, crashes %s, worker %s, pid %s, '
              'published %s times, last %s ago, due in %s',
              id, name, state, attempt, crashes, worker, pid, publications,
              clock_timestamp() - published_at, due_at - clock_timestamp())
  FROM pgbarrier_task WHERE state IN ('queued', 'running', 'expected')
"""

#: Rows whose outcome was not accepted exactly once.
MISCOUNTED = """
SELECT t.id, t.name, t.state, t.status, count(h.id) AS outcomes
  FROM pgbarrier_task t LEFT JOIN task_history h ON h.id = t.id AND h.became = 'done'
 GROUP BY t.id, t.name, t.state, t.status HAVING count(h.id) <> 1
"""

#: How many transactions the outcomes that stand took.
TRANSACTIONS = "SELECT count(DISTINCT CAST(xmin AS text)) FROM pgbarrier_task WHERE state = 'done'"

GRANTS = """
SELECT t.id, t.name, t.attempt, t.crashes,
       array_agg(h.at ORDER BY h.at) FILTER (WHERE h.became = 'running') AS granted,
       array_agg(h.at ORDER BY h.at) FILTER (WHERE h.was = 'running') AS ended
  FROM pgbarrier_task t JOIN task_history h ON h.id = t.id
 GROUP BY t.id, t.name, t.attempt, t.crashes ORDER BY min(h.at), t.id
"""

MANY = 30


def sum_of(size: int) -> int:
    """What the body of a submitted chord of ``size`` members sums up to."""
    return size * (size - 1) // 2


@dataclass
class Scene:
    """A test's surroundings; made by the ``make_scene`` fixture."""

    url: str
    broker: Broker
    app: Celery
    settings: Mapping[str, Any]
    engine: Engine
    start_worker: Callable[..., WorkerProcess]
    start_beat: Callable[..., BeatProcess]

    # -- processes

    def worker(self, **options: Any) -> WorkerProcess:
        """Start a worker; options as of ``WorkerProcess``, ``ready=False`` not to wait for it."""
        return self.start_worker(self.broker, self.backend, **self._process(options))

    def beat(self, **options: Any) -> BeatProcess:
        """Start a beat."""
        return self.start_beat(self.broker, self.backend, **self._process(options))

    def _process(self, options: dict[str, Any]) -> dict[str, Any]:
        settings = {**self.settings, **options.pop("settings", {})}
        env = {DATABASE: self.url, **options.pop("env", {})}
        return {**options, "settings": settings, "env": env}

    @property
    def backend(self) -> str:
        return backend_url(self.url)

    def environment(self) -> dict[str, str]:
        """What a process of the test needs to have an equal application."""
        return {**environment(self.broker, self.backend, self.settings), DATABASE: self.url}

    # -- chords

    def submit(self, label: str, size: int, seconds: float = 0.0, **body: Any) -> AsyncResult:
        """Call a chord of members 0, 1, ... that take ``seconds`` each."""
        return chord([part.s(n, seconds) for n in range(size)])(total.s(label, **body))

    def totals(self) -> dict[str, list[int]]:
        """What the bodies have summed up to, by label, one entry a run."""
        rows = self.query("SELECT label, array_agg(total) AS totals FROM body_run GROUP BY label")
        return {row.label: [int(value) for value in row.totals] for row in rows}

    def finished(self) -> int:
        """How many tasks have an outcome."""
        return int(self.query("SELECT count(*) FROM pgbarrier_task WHERE state = 'done'")[0][0])

    def republished(self) -> int:
        """How many messages the reaper has sent."""
        return int(self.query("SELECT sum(publications) FROM pgbarrier_task")[0][0])

    def wait_settled(self, expected: Mapping[str, int], deadline: float = 60.0) -> None:
        """Wait until nothing is open and no message waits; see what the bodies ran to.

        Every body ran once, with the sum expected; every task has one accepted outcome; every
        barrier was released once.
        """
        wait_until(
            lambda: set(self.totals()) >= set(expected) and not self.open() and self._drained(),
            deadline,
            self.report,
            interval=0.1,
        )
        assert self.totals() == {label: [value] for label, value in expected.items()}, self.report()
        assert self.query(MISCOUNTED) == [], self.report()
        closings = self.query("SELECT id, became FROM barrier_history ORDER BY id, at")
        ids = [row.id for row in self.query("SELECT id FROM pgbarrier_barrier ORDER BY id")]
        assert closings == [(i, state) for i in ids for state in ("ready", "released")]
        failed = self.query("SELECT id, status FROM pgbarrier_task WHERE status <> 'SUCCESS'")
        assert failed == [], self.report()

    def _drained(self) -> bool:
        return self.broker.depth() == 0

    def grants(self, name: str = "") -> list[Row[Any]]:
        """Every task in the order in which they were recorded, with when its claims began and
        ended."""
        return [row for row in self.query(GRANTS) if name in ("", row.name)]

    # -- rows

    def query(self, statement: str, **values: Any) -> list[Row[Any]]:
        """Run a statement, a transaction of its own."""
        with self.engine.connect() as connection:
            return list(connection.execute(text(statement), values).all())

    def open(self) -> list[str]:
        """What has not come to its end, a line each."""
        return [row.line for row in self.query(OPEN)]

    def report(self) -> str:
        """What stands in the database, for the message of a failure."""
        workers = self.query("""
            SELECT format('worker %s (%s) is %s, beat %s ago', id, name, state,
                          clock_timestamp() - beat_at) AS line
              FROM pgbarrier_worker ORDER BY started_at""")
        history = self.query("""
            SELECT format('%s: %s %s -> %s %s, crashes %s, worker %s, pid %s',
                          at, id, was, became, status, crashes, worker, pid) AS line
              FROM task_history WHERE id IN (
                   SELECT id FROM pgbarrier_task WHERE state <> 'done' LIMIT 5) ORDER BY at""")
        queues = self.query("SELECT * FROM pgbarrier_queue")
        lines = [
            f"{self.finished()} tasks have finished, {self.broker.depth()} messages wait, "
            f"{self.republished()} were sent again",
            f"bodies ran to {self.totals()}",
            *self.open()[:MANY],
            *(row.line for row in workers),
            *(row.line for row in history[:MANY]),
            *(f"miscounted: {row}" for row in self.query(MISCOUNTED)[:MANY]),
            *(f"queue: {row}" for row in queues),
        ]
        return "\n".join(lines)


@contextmanager
def audited(url: str) -> Iterator[Engine]:
    """An engine for the database of a test, whose tables now keep their history."""
    engine = create_engine(
        with_driver(url, "psycopg2"),  # prepares no statements, so that PgBouncer may stand between
        isolation_level="AUTOCOMMIT",
        pool_size=1,
        max_overflow=0,
        pool_pre_ping=True,
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(AUDIT)
    try:
        yield engine
    finally:
        engine.dispose()
