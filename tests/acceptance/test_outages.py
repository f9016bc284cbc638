"""PostgreSQL goes away for longer than a lease; a worker is paused for longer than a lease."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import chord

from celery_pgbarrier.embedded import EmbeddedPostgres
from tests.acceptance.scene import Scene, sum_of
from tests.acceptance.tasks import heard, overtaken, part, total
from tests.support.brokers import Broker
from tests.support.tasks import notes, sleepy
from tests.support.waiting import wait_until

SIZE = 12
RUNNING = 4
LEASE = {"pgbarrier_lease": 2.0, "pgbarrier_heartbeat": 0.5}


def outlast(scene: Scene, leases: float) -> None:
    """Wait until a lease has passed so many times."""
    end = time.monotonic() + leases * scene.settings["pgbarrier_lease"]
    wait_until(lambda: time.monotonic() > end, 60)


def flushed(scene: Scene) -> None:
    """Wait until everything that is committed survives a crash of the server."""
    here = scene.query("SELECT CAST(pg_current_wal_insert_lsn() AS text)")[0][0]
    reached = "SELECT pg_current_wal_flush_lsn() >= CAST(:here AS pg_lsn)"
    wait_until(lambda: scene.query(reached, here=here)[0][0])


@pytest.mark.slow
def test_a_database_outage_kills_no_live_claim(
    make_scene: Callable[..., Scene],
    own_postgres: EmbeddedPostgres,
    outage_database: str,
    redis_broker: Broker,
    tmp_path: Path,
) -> None:
    """Some members end while the database is away, some after; none runs twice."""
    scene = make_scene(outage_database, redis_broker, **LEASE)
    for worker in [scene.worker(concurrency=2, ready=False) for _ in range(2)]:
        worker.wait_ready()
    started, gates = tmp_path / "started", [tmp_path / f"gate-{n}" for n in range(SIZE)]
    header = [sleepy.s(n, str(gates[n]), str(started)) for n in range(SIZE)]
    chord(header)(total.s("outage"))
    wait_until(lambda: len(notes(started)) == RUNNING, message="all processes run a member")
    flushed(scene)

    own_postgres.kill()
    for first in notes(started)[: RUNNING // 2]:
        gates[int(first)].touch()
    outlast(scene, 2)
    own_postgres.start()
    back = time.monotonic()

    passed = "SELECT pass_at > :since FROM pgbarrier_reaper"
    for _ in range(3):
        now = scene.query("SELECT clock_timestamp()")[0][0]
        wait_until(lambda now=now: scene.query(passed, since=now)[0][0], 30, scene.report)
    for gate in gates:
        gate.touch()
    scene.wait_settled({"outage": sum_of(SIZE)})
    print(f"complete {time.monotonic() - back:.1f} s after the return")
    assert sorted(notes(started), key=int) == [str(n) for n in range(SIZE)]
    assert scene.query("SELECT DISTINCT attempt, crashes FROM pgbarrier_task") == [(1, 0)]
    assert scene.query("SELECT state FROM pgbarrier_worker") == [("running",)] * 2


@pytest.mark.slow
def test_a_paused_worker_is_refused(
    make_scene: Callable[..., Scene], database_url: str, redis_broker: Broker, tmp_path: Path
) -> None:
    """It wakes after another run's outcome: it stores nothing and sends nothing."""
    scene = make_scene(database_url, redis_broker, **LEASE)
    paused = scene.worker(concurrency=1)
    ran, gate, told = tmp_path / "ran", tmp_path / "gate", tmp_path / "told"
    member = overtaken.s(1000, 1, str(ran), str(gate)).set(link=heard.s(str(told)))
    chord([member, part.s(2), part.s(3)])(total.s("paused"))
    wait_until(ran.exists, message="the member runs")

    os.killpg(paused.pid, signal.SIGSTOP)
    start = time.monotonic()
    other = scene.worker(concurrency=1)
    ready = time.monotonic()
    wait_until(lambda: scene.totals() == {"paused": [6]}, 60, scene.report)
    print(f"taken over {time.monotonic() - start:.1f} s after the pause", end=", ")
    print(f"{time.monotonic() - ready:.1f} s after another worker was there")
    gate.touch()
    os.killpg(paused.pid, signal.SIGCONT)
    paused.wait_log("was refused")
    scene.wait_settled({"paused": 6})

    grants = scene.grants(overtaken.name)[0]
    assert (grants.attempt, grants.crashes) == (2, 1)
    assert notes(told) == ["1"]
    again = scene.submit("again", 20, 0.05)
    assert again.get(timeout=60) == sum_of(20)
    assert paused.running
    assert other.running
    assert paused.stop() == 0
    assert other.stop() == 0
    scene.wait_settled({"paused": 6, "again": sum_of(20)})
