"""A process whose forks dispatch chords and are killed at it.

It reads jobs from its standard input and writes a report of each to its standard output, JSON
objects, a line each. Imports are done once and each fork is a producer with connections of its
own, so that a kill costs milliseconds.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from types import TracebackType

from celery import chord

from celery_pgbarrier import faults
from tests.acceptance.scene import Scene
from tests.acceptance.tasks import part, total
from tests.support.workers import ROOT

STARTED, RETURNED = b"s", b"r"


@dataclass(frozen=True)
class Job:
    """A chord to dispatch, and when to kill its producer: after ``delay`` seconds or at a fault."""

    label: str
    size: int
    delay: float | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Report:
    """What became of a job: whether the call returned and the process was killed, after when."""

    label: str
    returned: bool
    killed: bool
    seconds: float


def dispatch(job: Job, signals: int) -> None:
    """Call the chord, telling before and after."""
    if job.fault:
        os.environ[faults.VARIABLE] = f"{job.fault}=kill"
        importlib.reload(faults)
    header = [part.s(n) for n in range(job.size)]
    os.write(signals, STARTED)
    chord(header)(total.s(job.label))
    os.write(signals, RETURNED)


def run(job: Job) -> Report:
    """Dispatch in a fork, which is killed at its moment."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(ours)
            dispatch(job, theirs)
            code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    assert os.read(ours, 1) == STARTED, "the producer did not come to the call"
    start = time.monotonic()
    if not select.select([ours], [], [], job.delay)[0]:
        os.kill(pid, signal.SIGKILL)
    returned = os.read(ours, 1) == RETURNED
    seconds = time.monotonic() - start
    os.close(ours)
    status = os.waitpid(pid, 0)[1]
    assert returned or os.WIFSIGNALED(status), f"the chord call raised: {job}"
    return Report(job.label, returned, os.WIFSIGNALED(status), seconds)


def serve() -> None:
    """Run jobs until the end of the standard input."""
    from tests.support.app import app

    app.set_default()
    for line in sys.stdin:
        report = run(Job(**json.loads(line)))
        print(json.dumps(asdict(report)), flush=True)


class Producer:
    """The process, from the test's side; a context manager."""

    def __init__(self, scene: Scene) -> None:
        self._environment = scene.environment()

    def __enter__(self) -> Producer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=ROOT,
            env={**os.environ, **self._environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def run(self, job: Job) -> Report:
        """Run a job and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the producer's process has ended; its error is in the captured output"
        return Report(**json.loads(line))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.kill()
        self._process.wait(30)


if __name__ == "__main__":
    serve()
