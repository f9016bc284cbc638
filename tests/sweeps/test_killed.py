"""Workers that die, or are told to stop, in the middle of a purge."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from celery import Celery

from tests.support import databases
from tests.support.brokers import Broker
from tests.support.tables import Tables
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess
from tests.sweeps.models import Document, ids
from tests.sweeps.sweeping import purge

TASK = purge.task_name
APP = "tests.sweeps.sweeping"


def fill(engine: sa.Engine, folder: Path, count: int) -> None:
    """Make documents with files."""
    rows = []
    for number in range(1, count + 1):
        path = folder / str(number)
        path.touch()
        rows.append({"id": number, "path": str(path), "deleted_at": sa.func.now()})
    for row in rows:
        del row["deleted_at"]
    with engine.begin() as connection:
        connection.execute(sa.insert(Document.__table__), rows)
        connection.execute(sa.update(Document).values(deleted_at=sa.func.now()))


def looks_alive_without_file(engine: sa.Engine) -> list[int]:
    """Return the documents whose row looks alive and whose file is gone."""
    query = sa.select(Document.id, Document.path).where(Document.status == "live")
    with engine.connect() as connection:
        return [row.id for row in connection.execute(query) if not Path(row.path).exists()]


def running_pid(database_url: str) -> int:
    """Return the process that has the turn."""
    holder = Tables(database_url).value("SELECT holder FROM pgbarrier_sweep")
    return int(holder.rpartition(" ")[2])


def free(database_url: str) -> bool:
    """Tell whether the lease of the run that was killed has run out."""
    over = "SELECT token IS NULL OR expires_at < clock_timestamp() FROM pgbarrier_sweep"
    return bool(Tables(database_url).value(over))


@pytest.mark.slow
def test_killed_twenty_times(
    engine: sa.Engine,
    app: Celery,
    redis_broker: Broker,
    database_url: str,
    start_worker: Callable[..., WorkerProcess],
    tmp_path: Path,
) -> None:
    count = 5000
    fill(engine, tmp_path, count)
    worker = start_worker(
        redis_broker,
        databases.backend_url(database_url),
        app=APP,
        concurrency=4,
        env={"SWEEPING_PAUSE": "0.0005"},
    )
    left, kills, seed = set(range(1, count + 1)), 0, random.Random(5)
    moment = threading.Event()
    while kills < 20 and left:
        app.send_task(TASK, ignore_result=True)
        before = len(left)
        wait_until(lambda before=before: len(ids(engine)) < before, 30, "the purge goes on", 0.01)
        moment.wait(seed.uniform(0.0, 0.15))
        if kills % 10 == 9:
            worker.kill()
            worker.start()
            worker.wait_ready()
        else:
            os.kill(running_pid(database_url), signal.SIGKILL)
            wait_until(lambda: free(database_url), 10, "the turn is free", 0.01)
        kills += 1
        now = ids(engine)
        assert now <= left, "a purged row came back"
        assert looks_alive_without_file(engine) == []
        left = now
    assert (kills, len(left) > 0) == (20, True), "the purge was over before it was killed"
    counts = app.send_task(TASK).get(timeout=60)
    while counts["stopped"] == "busy":  # the lease of the run that was killed last
        counts = app.send_task(TASK).get(timeout=60)
    assert (ids(engine), counts["left"], counts["stopped"]) == (set(), 0, None)
    assert not [path for path in tmp_path.iterdir() if path.name.isdigit()]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_shutdown_ends_the_run_after_its_batch(
    engine: sa.Engine,
    app: Celery,
    redis_broker: Broker,
    database_url: str,
    start_worker: Callable[..., WorkerProcess],
    tmp_path: Path,
    pool: str,
) -> None:
    fill(engine, tmp_path, 2000)
    worker = start_worker(
        redis_broker,
        databases.backend_url(database_url),
        app=APP,
        pool=pool,
        concurrency=1,
        env={"SWEEPING_PAUSE": "0.02"},  # 40 s for all of them
    )
    result = app.send_task(TASK)
    wait_until(lambda: len(ids(engine)) < 2000, 30, "the purge goes on")
    assert worker.stop(deadline=20) == 0
    counts = result.get(timeout=10)
    assert counts["stopped"] == "shutdown"
    assert 0 < counts["rows"] == 2000 - len(ids(engine))
    assert looks_alive_without_file(engine) == []
