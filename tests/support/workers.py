"""Real Celery processes, started, watched and killed by tests."""

from __future__ import annotations

import json
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from types import TracebackType
from typing import Any

from celery_pgbarrier.embedded import alive, child_pids, spawn
from tests.support.brokers import Broker
from tests.support.waiting import wait_until

__all__ = ["BeatProcess", "CeleryProcess", "WorkerProcess", "environment", "wait_until"]

ROOT = Path(__file__).parents[2]
TAIL = 8000


def environment(
    broker: Broker, backend: str, settings: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The variables by which ``tests.support.app`` is configured, in any process."""
    return {
        "PGBARRIER_TEST_BROKER": broker.url,
        "PGBARRIER_TEST_BACKEND": backend,
        "PGBARRIER_TEST_QUEUE": broker.queue,
        "PGBARRIER_TEST_CONF": json.dumps({**broker.settings(), **(settings or {})}),
    }


class CeleryProcess:
    """``python -m celery -A <app> <command>`` in a process group of its own.

    It ends with the test process (on Linux), and with the ``with`` block, which prints the end of
    its log if the block failed. ``start()`` may be called again after ``kill()`` or ``stop()``.

    :param backend: a ``result_backend`` URL.
    :param settings: Celery settings, JSON values only, added to those of the broker.
    :param env: more environment variables, such as ``PGBARRIER_FAULTS``.
    :param log: the file to write to.
    :param app: the application's module.
    """

    command: Sequence[str] = ()
    ready_text = ""

    def __init__(
        self,
        broker: Broker,
        backend: str,
        log: Path,
        *,
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        app: str = "tests.support.app",
        arguments: Sequence[str] = (),
    ) -> None:
        self.argv = [sys.executable, "-m", "celery", "-A", app, *self.command, *arguments]
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CELERY_"))
        }
        self.env = {
            **inherited,
            **environment(broker, backend, settings),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **(env or {}),
        }
        self.log_path = log
        self._log_start = 0
        self._process: Popen[bytes] | None = None

    @property
    def process(self) -> Popen[bytes]:
        assert self._process is not None, "start() was not called"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process; ``wait_ready()`` waits until it works."""
        assert not self.running, "it runs already"
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._process = spawn(self.argv, log=self.log_path, cwd=ROOT, env=self.env)

    def wait_ready(self, deadline: float = 60.0) -> None:
        """Wait until the log says that this start succeeded."""
        wait_until(self._is_ready, deadline, lambda: f"{self.ready_text!r} in\n{self.tail()}")

    def _is_ready(self) -> bool:
        assert self.running, f"exited with {self.process.returncode}:\n{self.tail()}"
        return self.ready_text in self.log()

    def wait_log(self, text: str, deadline: float = 30.0) -> None:
        """Wait until ``text`` stands in the log of the present run."""
        wait_until(lambda: text in self.log(), deadline, lambda: f"{text!r} in\n{self.tail()}")

    def log(self) -> str:
        """What the present run has written."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def tail(self) -> str:
        """The end of the log, all runs together."""
        if not self.log_path.exists():
            return "(no log)"
        return self.log_path.read_bytes()[-TAIL:].decode(errors="replace")

    def send(self, number: int) -> None:
        """Send a signal, such as SIGSTOP, to the main process alone."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL the whole group, as a crash of its machine would; wait until it is gone."""
        if self.running:
            with suppress(ProcessLookupError):  # too young to have made its group
                os.killpg(self.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait(30)

    def kill_parent(self) -> None:
        """SIGKILL the main process alone, and wait until its pool has followed it."""
        pool = child_pids(self.pid)
        self.process.kill()
        self.process.wait(30)
        try:
            # Celery asks Linux for this, but a child that has just been forked has not yet asked.
            wait_until(lambda: not alive(pool), 5.0)
        except AssertionError:
            for pid in alive(pool):
                os.kill(pid, signal.SIGKILL)

    def stop(self, deadline: float = 60.0) -> int:
        """Warm shutdown: SIGTERM, wait; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(deadline)
        except TimeoutExpired:
            raise AssertionError(f"no shutdown in {deadline:g} s:\n{self.tail()}") from None

    def __enter__(self) -> CeleryProcess:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        if exc is not None:
            print(f"--- {self.log_path.name}\n{self.tail()}")


class WorkerProcess(CeleryProcess):
    """A Celery worker.

    :param pool: ``prefork``, ``threads``, ``gevent`` or ``solo``.
    :param queues: by default the broker's one queue.
    :param hostname: by default one that no other worker has.
    """

    command = ("worker",)
    ready_text = " ready."

    def __init__(
        self,
        broker: Broker,
        backend: str,
        log: Path,
        *,
        pool: str = "prefork",
        concurrency: int = 2,
        hostname: str | None = None,
        queues: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        app: str = "tests.support.app",
        arguments: Sequence[str] = (),
    ) -> None:
        self.hostname = hostname or f"w{uuid.uuid4().hex[:8]}@test"
        own = [
            f"--pool={pool}",
            f"--concurrency={concurrency}",
            f"--hostname={self.hostname}",
            f"--queues={','.join(queues) or broker.queue}",
            "--loglevel=INFO",
            "--without-gossip",
            "--without-mingle",
        ]
        super().__init__(
            broker, backend, log, settings=settings, env=env, app=app,
            arguments=[*own, *arguments],
        )  # fmt: skip

    def __enter__(self) -> WorkerProcess:
        super().__enter__()
        return self

    def children(self) -> list[int]:
        """The pool's processes (prefork)."""
        return child_pids(self.pid)

    def kill_children(self, number: int = signal.SIGKILL) -> list[int]:
        """Kill the pool's processes, not their parent; which they were."""
        killed = []
        for pid in self.children():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                killed.append(pid)
        return killed


class BeatProcess(CeleryProcess):
    """A Celery beat with a schedule file of its own."""

    command = ("beat",)
    ready_text = "beat: Starting..."

    def __init__(
        self,
        broker: Broker,
        backend: str,
        log: Path,
        *,
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        app: str = "tests.support.app",
    ) -> None:
        schedule = log.with_suffix(".schedule")
        arguments = ["--loglevel=INFO", "--pidfile=", f"--schedule={schedule}"]
        super().__init__(
            broker, backend, log, settings=settings, env=env, app=app, arguments=arguments
        )

    def __enter__(self) -> BeatProcess:
        super().__enter__()
        return self
