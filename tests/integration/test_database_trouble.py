"""PostgreSQL in every kind of trouble: workers wait, and an outcome is stored once."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from celery_pgbarrier.embedded import EmbeddedPostgres
from celery_pgbarrier.store import schema
from celery_pgbarrier.store.database import Database
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.inline import InlineWorker, workers
from tests.support.tables import Tables
from tests.support.tasks import hooked, xsum
from tests.support.waiting import wait_until

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]

pytestmark = pytest.mark.slow

#: How long each trouble lasts (seconds): longer than a few tries.
LASTS = 0.7
APP = "app"  # the role of the application: what is limited, a superuser could pass


@pytest.fixture(scope="module")
def meddler() -> Iterator[ThreadPoolExecutor]:
    """One thread that makes the trouble: a server ends with the thread that has started it."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(int).result()
        yield executor


@pytest.fixture(scope="module")
def cluster(meddler: ThreadPoolExecutor) -> Iterator[EmbeddedPostgres]:
    """A server for this module, with migrated tables and a role that is no superuser."""
    with EmbeddedPostgres(options={"fsync": "off", "deadlock_timeout": "300ms"}) as server:
        schema.migrate(server.url())
        Tables(server.url()).ask(f"CREATE ROLE {APP} LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA"
                                 f" public TO {APP}")  # fmt: skip
        yield server


class Trouble:
    """What befalls the database; ``begin`` it, and it ends after a while by itself."""

    def __init__(self, server: EmbeddedPostgres, meddler: ThreadPoolExecutor) -> None:
        self.server = server
        self.meddler = meddler
        self.tables = Tables(server.url())
        self.over = threading.Event()
        self._running: list[Future[None]] = []

    def begin(self, name: str) -> None:
        """Begin a trouble; it is there when this returns."""
        there = threading.Event()

        def run() -> None:
            try:
                with getattr(self, name)():
                    there.set()
                    self.over.wait(LASTS)
            finally:
                there.set()

        self.submit(run)
        assert there.wait(30)

    def submit(self, work: Callable[[], None]) -> None:
        """Do something in the thread of troubles; its errors are raised by :meth:`end`."""
        self._running.append(self.meddler.submit(work))

    def end(self) -> None:
        """Wait until all is over."""
        for running in self._running:
            running.result(60)

    # -- troubles

    @contextmanager
    def crashed(self) -> Iterator[None]:
        self.server.kill()
        try:
            yield
        finally:
            self.server.start()

    @contextmanager
    def restarted(self) -> Iterator[None]:
        self.server.stop()
        try:
            yield
        finally:
            self.server.start()

    @contextmanager
    def refusing_connections(self) -> Iterator[None]:
        with self._altered("DATABASE postgres ALLOW_CONNECTIONS false",
                           "DATABASE postgres ALLOW_CONNECTIONS true"):  # fmt: skip
            yield

    @contextmanager
    def out_of_connections(self) -> Iterator[None]:
        with self._altered(f"ROLE {APP} CONNECTION LIMIT 0", f"ROLE {APP} CONNECTION LIMIT -1"):
            yield

    @contextmanager
    def read_only(self) -> Iterator[None]:
        setting = "default_transaction_read_only"
        with self._altered(f"ROLE {APP} SET {setting} = on", f"ROLE {APP} RESET {setting}"):
            yield

    @contextmanager
    def statement_timeout(self) -> Iterator[None]:
        with self._altered(f"ROLE {APP} SET statement_timeout = '100ms'",
                           f"ROLE {APP} RESET statement_timeout"), self._locked():  # fmt: skip
            yield

    @contextmanager
    def locked_by_a_migration(self) -> Iterator[None]:
        with self._altered(f"ROLE {APP} SET lock_timeout = '100ms'",
                           f"ROLE {APP} RESET lock_timeout"), self._locked():  # fmt: skip
            yield

    @contextmanager
    def _altered(self, change: str, back: str) -> Iterator[None]:
        """A setting that connections get when they are made; those that are open are cut."""
        admin = Tables(self.server.url("template1"))
        admin.ask(f"ALTER {change}")
        admin.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = :role",
                  role=APP)  # fmt: skip
        try:
            yield
        finally:
            admin.ask(f"ALTER {back}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        engine = create_engine(self.server.url(), poolclass=NullPool)
        with engine.begin() as connection:
            connection.execute(text("LOCK TABLE pgbarrier_task IN ACCESS EXCLUSIVE MODE"))
            yield


@pytest.fixture
def trouble(cluster: EmbeddedPostgres, meddler: ThreadPoolExecutor) -> Iterator[Trouble]:
    made = Trouble(cluster, meddler)
    yield made
    made.end()


@pytest.fixture
def trouble_app(
    request: pytest.FixtureRequest, make_app: Callable[..., Celery], redis_broker: Broker,
    cluster: EmbeddedPostgres,
) -> Celery:  # fmt: skip
    url = cluster.url(driver=getattr(request, "param", "psycopg2")).replace("postgres@", f"{APP}@")
    return make_app(redis_broker, databases.backend_url(url))


@pytest.fixture
def trouble_worker(trouble_app: Celery, redis_broker: Broker) -> Iterator[InlineWorker]:
    with workers(trouble_app, redis_broker) as make:
        yield make()


TROUBLES = [
    "crashed", "restarted", "refusing_connections", "out_of_connections", "read_only",
    "statement_timeout", "locked_by_a_migration",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "trouble_app"),
    [*((name, "psycopg2") for name in TROUBLES), *((name, "psycopg") for name in TROUBLES[3:5])],
    indirect=["trouble_app"],
)
def test_trouble_at_claim_and_outcome_fails_and_repeats_nothing(
    trouble_worker: InlineWorker, trouble: Trouble, hook: Hook, name: str
) -> None:
    runs: list[int] = []

    @hook("trouble")
    def troubled(task: Any, value: Any) -> Any:
        runs.append(value)
        trouble.begin(name)
        return value

    result = chord([hooked.s(1, "trouble"), hooked.s(2, "trouble")], xsum.s()).delay()
    first = trouble_worker.take()
    trouble.begin(name)
    trouble_worker.run(first)
    trouble_worker.drain()
    trouble.end()
    assert runs == [1, 2]
    assert result.get(timeout=10) == 3
    ids = [result.id, *(member.id for member in result.parent.results)]
    rows = trouble.tables.ask("SELECT crashes, state, status FROM pgbarrier_task"
                              " WHERE id = ANY(:ids)", ids=ids)  # fmt: skip
    assert {tuple(row) for row in rows} == {(0, "done", "SUCCESS")}
    assert len(rows) == 3
    assert trouble.tables.count("slot", "remaining <> 0") == 0


def test_a_deadlock_is_tried_again(
    trouble_worker: InlineWorker, trouble: Trouble, hook: Hook
) -> None:
    """The outcome holds its row and waits for its slot, whose holder waits for that row."""
    result = chord([hooked.s(1, "quiet"), hooked.s(2, "deadlock")], xsum.s()).delay()
    bad = result.parent.results[1].id
    holding, done = threading.Event(), threading.Event()

    def cross() -> None:
        engine = create_engine(trouble.server.url(), poolclass=NullPool)
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL deadlock_timeout = '60s'"))
            connection.execute(text("SELECT * FROM pgbarrier_slot FOR UPDATE"))
            holding.set()
            wait_until(lambda: trouble.tables.value(waits) > 0, 20, interval=0.02)
            row = "SELECT 1 FROM pgbarrier_task WHERE id = :id FOR UPDATE"
            connection.execute(text(row), {"id": bad})
        done.set()

    @hook("quiet")
    def quiet(task: Any, value: Any) -> None:
        pass

    @hook("deadlock")
    def deadlock(task: Any, value: Any) -> None:
        trouble.submit(cross)
        assert holding.wait(10)

    before = deadlocks(trouble.tables)
    trouble_worker.drain()
    assert done.wait(10)
    assert result.get(timeout=10) == 3
    assert trouble.tables.task(bad).attempt == 1
    wait_until(lambda: deadlocks(trouble.tables) > before, 20, "the server counts a deadlock")


def deadlocks(tables: Tables) -> int:
    return int(
        tables.value("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    )


# -- failover


@contextmanager
def standby_of(primary: EmbeddedPostgres) -> Iterator[EmbeddedPostgres]:
    """A streaming replica of a server; what the server answers is on it."""
    folder = Path(tempfile.mkdtemp(prefix="pgbarrier-standby-"))
    lower = {}
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody")
        lower = {"user": "nobody", "extra_groups": []}
    try:
        subprocess.run(
            [primary.bindir / "pg_basebackup", "-h", "127.0.0.1", "-p", str(primary.port),
             "-U", "postgres", "-D", folder / "data", "-R", "-X", "stream", "-c", "fast"],
            check=True, capture_output=True, cwd=folder, timeout=60, **lower,
        )  # fmt: skip
        with EmbeddedPostgres(folder, bindir=primary.bindir, options=dict(FAST)) as standby:
            tables = Tables(primary.url())
            streams = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
            wait_until(lambda: tables.value(streams) == 1, 30, "the replica streams")
            tables.ask("ALTER SYSTEM SET synchronous_standby_names = '*'")
            tables.ask("SELECT pg_reload_conf()")
            waits = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
            wait_until(lambda: tables.value(waits) == 1, 30, "the primary waits for it")
            yield standby
    finally:
        shutil.rmtree(folder, ignore_errors=True)


FAST = {"fsync": "off"}


@pytest.mark.parametrize(("driver", "attributes"), [("psycopg2", "any"), ("psycopg", "read-write")])
def test_a_failover_to_a_synchronous_replica_loses_and_repeats_nothing(
    make_app: Callable[..., Celery], redis_broker: Broker, hook: Hook, driver: str,
    attributes: str,
) -> None:  # fmt: skip
    """The URL names both; without ``read-write`` the replica answers before it may write."""
    runs: list[int] = []
    with EmbeddedPostgres(options=dict(FAST)) as primary:
        schema.migrate(primary.url())
        with standby_of(primary) as standby:
            hosts = [f"host=127.0.0.1:{server.port}" for server in (primary, standby)]
            query = "&".join([*hosts, f"target_session_attrs={attributes}"])
            url = f"postgresql+{driver}://postgres@/postgres?{query}"
            app = make_app(redis_broker, databases.backend_url(url))
            promoted = threading.Event()

            def promote() -> None:
                Tables(standby.url()).value("SELECT pg_promote()")
                promoted.set()

            @hook("fail over")
            def fail_over(task: Any, value: Any) -> None:
                runs.append(value)
                if value == 3:
                    primary.kill()
                    threading.Timer(LASTS, promote).start()

            result = chord([hooked.s(n, "fail over") for n in range(6)], xsum.s()).delay()
            with workers(app, redis_broker) as make:
                make().drain()
            assert promoted.wait(10)
            assert result.get(timeout=10) == 15
            assert sorted(runs) == list(range(6))
            tables = Tables(standby.url())
            assert tables.barrier_states() == ["released"]
            assert tables.count("task", "state <> 'done' OR crashes > 0") == 0
            assert tables.count("slot", "remaining <> 0") == 0
            app.backend.database.dispose()


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_process_that_is_paused_within_a_transaction_does_not_keep_its_locks(
    database_url: str, driver: str
) -> None:
    """The server ends the transaction, and the work is done again when the process goes on."""
    lock = text("SELECT id FROM pgbarrier_reaper WHERE id = 1 FOR UPDATE")
    url = make_url(databases.with_driver(database_url, driver))
    paused, other = Database(url, idle_timeout=0.2), Database(url)
    locked, go_on = threading.Event(), threading.Event()
    passes: list[int] = []

    def work(connection: Connection) -> int:
        passes.append(1)
        connection.execute(lock)
        locked.set()
        assert go_on.wait(30)
        return int(connection.execute(lock).scalar_one())

    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(paused.transaction, work, 10.0)
        assert locked.wait(30)
        assert other.transaction(lambda connection: connection.execute(lock).scalar_one()) == 1
        assert not held.done()
        go_on.set()
        assert held.result(30) == 1
    assert len(passes) == 2
    paused.dispose()
    other.dispose()
