"""Two workers and beat, as processes that can be killed in every way."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from celery_pgbarrier.embedded import child_pids, spawn

WORKERS = 2
CONCURRENCY = 2
ROOT = Path(__file__).parents[2]


class Crew:
    """Starts the processes, kills and replaces them, and leaves none behind."""

    def __init__(self, logs: Path, env: Mapping[str, str], rng: random.Random) -> None:
        self.logs = logs
        self.env = dict(env)
        self.rng = rng
        self.workers: list[subprocess.Popen[bytes]] = []
        self.everyone: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.workers = [self._start_worker(number) for number in range(WORKERS)]
        schedule = f"{self.env['TMPDIR']}/beat-schedule"
        self._start("beat", "beat", "--schedule", schedule, "--pidfile=")

    def kill_worker(self) -> str:
        """SIGKILL a worker with its whole pool."""
        return self._kill_and_replace("worker and pool", os.killpg)

    def kill_parent(self) -> str:
        """SIGKILL the parent of a pool only: its children learn of it when they next want work."""
        return self._kill_and_replace("worker's parent", os.kill)

    def kill_child(self) -> str | None:
        """SIGKILL one process of a pool; None if there is no pool at the moment."""
        children = [pid for worker in self.workers for pid in child_pids(worker.pid)]
        if not children:
            return None
        pid = self.rng.choice(children)
        os.kill(pid, signal.SIGKILL)
        return f"SIGKILL pool child {pid}"

    def close(self) -> None:
        """End every process that was ever started here, and the pools of those killed before."""
        for process in self.everyone:
            # A process that was killed alone has not been waited for yet, so that its id still
            # names the group of its children and nobody else's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for process in self.everyone:
            process.wait()
        self.everyone.clear()

    def _kill_and_replace(self, what: str, kill: Callable[[int, int], None]) -> str:
        number = self.rng.randrange(WORKERS)
        pid = self.workers[number].pid
        kill(pid, signal.SIGKILL)
        self.workers[number] = self._start_worker(number)
        return f"SIGKILL {what} {pid}"

    def _start_worker(self, number: int) -> subprocess.Popen[bytes]:
        options = f"--hostname=w{number}@%h --concurrency={CONCURRENCY} --loglevel=INFO"
        quiet = "--without-gossip --without-mingle"
        return self._start(f"worker-{number}", "worker", *options.split(), *quiet.split())

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        celery = [sys.executable, "-m", "celery", "-A", "examples.demo.tasks"]
        log = self.logs / f"{name}.log"
        process = spawn([*celery, *arguments], log=log, cwd=ROOT, env=self.env)
        self.everyone.append(process)
        return process
