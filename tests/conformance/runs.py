"""Running one file of Celery's suite, with servers of its own."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from celery_pgbarrier.embedded import EmbeddedBroker, spawn
from tests.conformance.exceptions import left_out
from tests.conformance.outcomes import Job, Outcome, Verdict, read_report
from tests.conformance.suites import Suite
from tests.support.brokers import virtual_host
from tests.support.databases import temporary_database, with_driver
from tests.support.services import Services

BROKERS = ("redis", "rabbitmq")
BACKENDS = ("redis", "database", "pgbarrier")
OURS = "pgbarrier"

#: As Celery's own marks have it: some tests wait ten times for what must not happen.
TEST_SECONDS = 300
FILE_SECONDS = 45 * 60

# Where there is one RabbitMQ virtual host for all, one run at a time.
_one_virtual_host = threading.Lock()


class Stopped(Exception):
    """The runner was stopped before a run had ended."""


@dataclass(frozen=True)
class Place:
    """The servers of a run, and the folder for what it writes."""

    folder: Path
    redis_port: int
    broker: str
    backend: str


class Runner:
    """Runs jobs: each with a Redis server, a database and a virtual host of its own.

    Parameters:
        services: the PostgreSQL and RabbitMQ servers in which the runs get their places.
        packages: folders with the package under test and our plugin, by Celery version.
        only: a pytest ``-k`` expression, for a part of each file.
        patience: what the suite's own time limits are multiplied by, on a machine that does
            other work.
    """

    def __init__(
        self, services: Services, packages: dict[str, Path], only: str = "", patience: int = 1
    ) -> None:
        self._services = services
        self._packages = packages
        self._only = ["-k", only] if only else []
        self._patience = patience
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let the runs of other threads end now; their outcomes are worth nothing."""
        self._stopped.set()

    def run(self, suite: Suite, job: Job) -> Outcome:
        """Run a file; what failed is run again, once, by itself.

        Raises:
            Stopped: the runner was stopped.
        """
        started = time.monotonic()
        outcome = Outcome(job, date=f"{datetime.date.today():%Y-%m-%d}")
        outcome.tests = self._tests(suite, job, [f"{job.file}.py"])
        outcome.seconds = round(time.monotonic() - started, 1)
        return self.again(suite, outcome)

    def again(self, suite: Suite, outcome: Outcome) -> Outcome:
        """Give the tests of an outcome that failed a second chance.

        Raises:
            Stopped: the runner was stopped.
        """
        failed = outcome.to_rerun()
        if failed:
            tests = self._tests(suite, outcome.job, failed)
            outcome.after_rerun(Outcome(outcome.job, tests))
        return outcome

    def _tests(self, suite: Suite, job: Job, names: list[str]) -> dict[str, Verdict]:
        with (
            tempfile.TemporaryDirectory(prefix="pgbarrier-conformance-") as folder,
            self._place(job, Path(folder)) as place,
        ):
            return self._pytest(suite, job, place, names)

    @contextmanager
    def _place(self, job: Job, folder: Path) -> Iterator[Place]:
        rabbitmq = self._rabbitmq() if job.broker == "rabbitmq" else nullcontext("")
        with (
            EmbeddedBroker() as redis,
            temporary_database(self._services.postgres) as database_url,
            rabbitmq as virtual_host_url,
        ):
            database = with_driver(database_url, "psycopg2")
            backends = {
                "redis": redis.url(),
                "database": f"db+{database}",
                OURS: f"pgbarrier+{database}",
            }
            broker = virtual_host_url or redis.url()
            yield Place(folder, redis.port, broker, backends[job.backend])

    @contextmanager
    def _rabbitmq(self) -> Iterator[str]:
        assert self._services.rabbitmq, "RabbitMQ was looked for before"
        with virtual_host(self._services.rabbitmq) as url:
            shared = url == self._services.rabbitmq
            with _one_virtual_host if shared else nullcontext():
                yield url

    def _pytest(self, suite: Suite, job: Job, place: Place, names: list[str]) -> dict[str, Verdict]:
        report, log = place.folder / "report", place.folder / "log"
        options = ["-p", "no:cacheprovider", "-p", "celery.contrib.pytest"]
        options += ["-p", "pgbarrier_conformance", "--basetemp", str(place.folder / "tmp")]
        options += ["--timeout", str(TEST_SECONDS * self._patience), "--quiet", *self._only]
        # That a test passes which Celery expects to fail is no failure of a backend.
        options += ["--override-ini", "xfail_strict=false"]
        tests = [f"t/integration/{name}" for name in names]
        process = spawn(
            [str(suite.python), "-m", "pytest", *options, *tests],
            log=log,
            cwd=suite.source,
            env=self._environment(suite, job, place, report),
        )
        self._wait(process)
        found = read_report(report)
        if process.returncode not in (0, 1, 5) or not (found or self._only):
            tail = " | ".join(log.read_text(errors="replace").splitlines()[-8:])
            ended = f"pytest ended with {process.returncode}: {tail}"
            found[f"{job.file}.py"] = Verdict("failed", ended)
        return found

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until a run ends, its time is over or the runner is stopped; end all of it then."""
        deadline = time.monotonic() + FILE_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if self._stopped.wait(0.2):
                break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._stopped.is_set():
            raise Stopped

    def _environment(self, suite: Suite, job: Job, place: Place, report: Path) -> dict[str, str]:
        ours = job.backend == OURS
        orders = {
            "report": str(report),
            "task_cls": "celery_pgbarrier:BarrierTask" if ours else None,
            "lift": ours,
            "patience": self._patience,
            "left_out": left_out() if ours else [],
        }
        (place.folder / "orders").write_text(json.dumps(orders))
        path = os.pathsep.join([f"{suite.environment}/bin", os.environ.get("PATH", "")])
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            "C_FORCE_ROOT": "true",  # a worker that accepts pickle refuses root otherwise
            "PATH": path,
            "PGBARRIER_CONFORMANCE": str(place.folder / "orders"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(self._packages[suite.version]),
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(place.redis_port),
            "TEST_BACKEND": place.backend,
            "TEST_BROKER": place.broker,
            "WORKER_LOGLEVEL": "INFO",  # as in Celery's own runs: some tests read the worker's log
        }
