"""The installed wheel does what the README promises; run by `make wheel-smoke`, not from here."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points, files
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.pool import NullPool

import celery_pgbarrier
from celery_pgbarrier.embedded import EmbeddedBroker, EmbeddedPostgres, spawn

HERE = Path(__file__).parent
# The chord of a user: the database's tables are made by the command, not on first use.
CHORD = """
from celery import chord
from proj import double, total
print(chord([double.s(n) for n in range(10)], total.s()).delay().get(timeout=60))
"""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URL of a database of its own: on the server of PGBARRIER_TEST_POSTGRES, or embedded."""
    given = os.environ.get("PGBARRIER_TEST_POSTGRES", "embedded")
    if given == "embedded":
        with EmbeddedPostgres() as server:
            yield server.url()
        return
    name = f"pgbarrier_smoke_{uuid.uuid4().hex}"
    engine = create_engine(given, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        try:
            yield make_url(given).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def environment(database: str) -> Iterator[dict[str, str]]:
    with EmbeddedBroker() as broker:
        yield {
            **os.environ,
            "SMOKE_BROKER": broker.url(),
            "SMOKE_BACKEND": f"pgbarrier+{database}",
        }


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@contextmanager
def worker(environment: dict[str, str], log: Path) -> Iterator[None]:
    arguments = ["worker", "--pool=solo", "--loglevel=INFO", "--without-mingle"]
    command = [sys.executable, "-m", "celery", "-A", "proj", *arguments]
    process = spawn(command, log=log, cwd=HERE, env=environment)
    try:
        yield
    except BaseException:
        print(log.read_text())
        raise
    finally:
        process.kill()
        process.wait()


def test_it_is_the_installed_copy() -> None:
    assert Path(celery_pgbarrier.__file__).is_relative_to(sys.prefix)


def test_it_carries_its_data_files() -> None:
    installed = {str(path) for path in files("celery-pgbarrier") or ()}
    assert "celery_pgbarrier/py.typed" in installed
    assert "celery_pgbarrier/store/migrations/env.py" in installed
    assert "celery_pgbarrier/store/migrations/script.py.mako" in installed
    assert "celery_pgbarrier/store/migrations/versions/v0001_initial.py" in installed
    assert not [path for path in installed if path.startswith("tests/")]


@pytest.mark.parametrize("group", ["celery.result_backends", "celery.commands"])
def test_entry_points_resolve(group: str) -> None:
    (entry,) = entry_points(group=group, name="pgbarrier")
    assert entry.load() is not None


def test_public_names_import() -> None:
    for name in ("BarrierBackend", "BarrierTask", "beat_schedule"):
        assert name in celery_pgbarrier.__all__
        assert getattr(celery_pgbarrier, name) is not None


def test_the_command_has_help(environment: dict[str, str]) -> None:
    text = run(environment, "-m", "celery", "-A", "proj", "pgbarrier", "--help")
    assert "migrate" in text
    assert "reap" in text


def test_a_chord_runs_on_a_migrated_database(environment: dict[str, str], tmp_path: Path) -> None:
    run(environment, "-m", "celery", "-A", "proj", "pgbarrier", "migrate")
    with worker(environment, tmp_path / "worker.log"):
        assert run(environment, "-c", CHORD).strip() == "90"
