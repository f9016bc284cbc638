"""The contenders: each with a database, a queue, a worker and a producer of its own."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import make_url

from tests.support.brokers import Broker, rabbitmq_corner, virtual_host
from tests.support.databases import autocommit, temporary_database
from tests.support.workers import ROOT, WorkerProcess, environment

#: What each peer is, in the order in which tables show them.
PEERS = {
    "redis": "Celery's Redis backend",
    "pgbarrier": "celery-pgbarrier",
    "database": "Celery's database backend on PostgreSQL",
    "django": "django-celery-results on PostgreSQL",
    "ignored": "results ignored (the floor)",
    "redis-again": "Celery's Redis backend a second time: what is noise",
}
CHORDS = ("redis", "pgbarrier", "database", "django", "redis-again")
RESULTS = ("redis", "pgbarrier", "database", "django", "ignored", "redis-again")
SLOW = ("database", "django")
PROCESSES = 2  # of each worker's pool
PATIENCE = 400  # for one answer (seconds)


class ProducerError(Exception):
    """A producer could not do what it was asked to."""


class Producer:
    """A process that calls tasks of one peer; see ``benchmarks.producing``."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.producer"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
                cwd=ROOT, env=env, text=True, start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid

    def call(self, function: str, **arguments: Any) -> Any:
        """Run a function there and return what it returns."""
        assert self._process.stdin
        assert self._process.stdout
        line = json.dumps({"function": function, "arguments": arguments})
        print(line, file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            self.kill()
            raise ProducerError(f"{function}: no answer in {PATIENCE} s")
        answer = self._process.stdout.readline()
        if not answer:
            raise ProducerError(f"{function}: the producer ended ({self._process.wait(10)})")
        values = json.loads(answer)
        if "error" in values:
            raise ProducerError(f"{function}: {values['error']}")
        return values["result"]

    @property
    def running(self) -> bool:
        """Whether it still answers."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process and those that it started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()


@dataclass
class Peer:
    """One contender, set up."""

    name: str
    broker: Broker
    database: str | None
    env: dict[str, str]
    folder: Path
    backend: str
    settings: dict[str, Any]
    stack: ExitStack = field(repr=False)
    _worker: WorkerProcess | None = None
    _producer: Producer | None = None

    @property
    def worker(self) -> WorkerProcess:
        """Its worker, running and warm."""
        if self._worker is None:
            worker = WorkerProcess(
                self.broker, self.backend, self.folder / f"{self.name}-worker.log",
                concurrency=PROCESSES, settings=self.settings, env=self.env,
                app="benchmarks.app", arguments=["--loglevel=WARNING", "--without-heartbeat"],
            )  # fmt: skip
            self._worker = self.stack.enter_context(worker)
            self._warm_up()
        return self._worker

    def _warm_up(self) -> None:
        if self.name == "ignored":
            self.producer.call("flow", count=50)
        else:
            self.producer.call("chords", size=20, count=2)

    @property
    def producer(self) -> Producer:
        """Its producer."""
        if self._producer is None or not self._producer.running:
            self._producer = self.stack.enter_context(_closing(self.new_producer()))
        return self._producer

    def new_producer(self) -> Producer:
        """One more producer, with nothing in its memory yet; the caller closes it."""
        inherited = {key: v for key, v in os.environ.items() if not key.startswith("CELERY_")}
        env = {
            **inherited,
            **environment(self.broker, self.backend, self.settings),
            **self.env,
        }
        return Producer(env, self.folder / f"{self.name}-producer.log")

    def call(self, function: str, **arguments: Any) -> Any:
        """Run a function in its producer, with its worker running."""
        assert self.worker.running, self.worker.tail()
        return self.producer.call(function, **arguments)

    def stop_worker(self) -> None:
        """End its worker, so that it costs nothing any more."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def close(self) -> None:
        """End its processes."""
        self.stop_worker()
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def drop_queue(self, name: str) -> None:
        """Delete a queue with what waits in it."""
        with self.broker.connection() as connection, suppress(Exception):
            connection.channel().queue_delete(name)


class _closing:
    def __init__(self, producer: Producer) -> None:
        self.producer = producer

    def __enter__(self) -> Producer:
        return self.producer

    def __exit__(self, *_: object) -> None:
        self.producer.close()


class Lab:
    """Makes peers as they are asked for, and clears up after them."""

    def __init__(self, postgres: str, rabbitmq: str, redis_url: str, names: Sequence[str]) -> None:
        self.postgres, self.redis, self.names = postgres, redis_url, tuple(names)
        self.run = f"pgbarrier-bench-{uuid.uuid4().hex[:12]}"
        self.begun = time.monotonic()
        self.deadline, self.cut = float("inf"), 0
        self._rabbitmq = rabbitmq
        self._peers: dict[str, Peer] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Lab:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(self.run)))
        self._stack.callback(self._forget)
        self._vhost = self._stack.enter_context(virtual_host(self._rabbitmq))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _forget(self) -> None:
        with redis.Redis.from_url(self.redis) as client:
            for key in client.scan_iter(match=f"{self.run}*", count=1000):
                client.delete(key)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that take part in this run."""
        return [name for name in names if name in self.names]

    def turns(self, names: Sequence[str], rounds: int, slow: int | None = None) -> Iterator[Peer]:
        """Peers in interleaved rounds, while the question has time.

        Each round begins with another peer; those that poll take part in ``slow`` rounds only.
        """
        for number in range(rounds):
            chosen = [
                name for name in self.chosen(names)
                if name not in SLOW or slow is None or number < slow
            ]  # fmt: skip
            shift = number % max(len(chosen), 1)
            for name in chosen[shift:] + chosen[:shift]:
                if time.monotonic() > self.deadline:
                    self.cut += 1
                else:
                    yield self.peer(name)

    def peer(self, name: str) -> Peer:
        """A peer, made at its first use."""
        if name not in self._peers:
            self._peers[name] = self._make(name)
        return self._peers[name]

    def fresh(self, name: str = "pgbarrier", **settings: Any) -> Peer:
        """One more peer with a database of its own, for what leaves rows behind."""
        return self._make(name, **settings)

    def discard(self, peer: Peer) -> None:
        """Drop a fresh peer's database now, which may be large."""
        peer.close()
        assert peer.database
        with autocommit(self.postgres) as connection:
            name = make_url(peer.database).database
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def stop_workers(self) -> None:
        """End all workers, so that what follows has the machine for itself."""
        for peer in self._peers.values():
            peer.stop_worker()

    def told(self, name: str) -> list[Any]:
        """What tasks have told under a name since the last look."""
        key, found = f"{self.run}:{name}", []
        with redis.Redis.from_url(self.redis) as client:
            while (value := client.rpop(key)) is not None:
                found.append(json.loads(value))
        return found

    def _make(self, name: str, **settings: Any) -> Peer:
        broker = self._stack.enter_context(rabbitmq_corner(self._vhost))
        kind = name.partition("-")[0]
        database = None
        if kind in ("pgbarrier", "database", "django"):
            database = self._stack.enter_context(temporary_database(self.postgres))
        env = {
            "BENCH_PEER": kind,
            "BENCH_RUN": self.run,
            "BENCH_CHANNEL": self.redis,
            "BENCH_ENDS": str(self.folder / f"{name}-{uuid.uuid4().hex[:6]}.ends"),
            "BENCH_DATABASE": database or "",
        }
        if kind == "django":
            env["DJANGO_SETTINGS_MODULE"] = "benchmarks.django_settings"
            command = [sys.executable, "-m", "django", "migrate", "--verbosity=0"]
            subprocess.run(command, env={**os.environ, **env}, cwd=ROOT, check=True)
        backend = {
            "redis": self.redis,
            "pgbarrier": f"pgbarrier+{database}",
            "database": f"db+{database}",
            "django": "django-db",
            "ignored": "disabled://",
        }[kind]
        own: dict[str, Any] = {}
        if kind == "redis":
            own["result_backend_transport_options"] = {"global_keyprefix": f"{self.run}.{name}."}
        if kind == "ignored":
            own["task_ignore_result"] = True
        return Peer(
            name, broker, database, env, self.folder, backend, {**own, **settings}, self._stack
        )
