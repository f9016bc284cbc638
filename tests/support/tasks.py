"""Tasks for tests, each once with the application's task class and once plain.

They belong to whichever application is current: ``add.s(1, 2)``, ``plain.add.s(1, 2)``.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import celery
from celery import shared_task
from celery.exceptions import SoftTimeLimitExceeded

from tests.support.waiting import wait_until

#: The same tasks on ``celery.Task``, under names that begin with ``plain.``.
plain = SimpleNamespace()


def both(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Make a function a task of either kind."""
    if function is None:
        return lambda function: both(function, **options)
    name = function.__name__
    other = shared_task(function, name=f"plain.{name}", base=celery.Task, **options)
    setattr(plain, name, other)
    return shared_task(function, name=f"test.{name}", **options)


def note(path: str, line: object) -> None:
    """Append a line to a file; whole, whoever else does the same at the time."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def notes(path: str | Path) -> list[str]:
    """The lines that :func:`note` wrote."""
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def first(path: str) -> bool:
    """Whether nobody has asked with this path before."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@both
def add(x: Any, y: Any) -> Any:
    return x + y


@both
def xsum(numbers: Iterable[Any]) -> Any:
    return sum(numbers)


@both
def identity(value: Any) -> Any:
    return value


@both
def echo(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """What it was called with."""
    return {"args": list(args), "kwargs": kwargs}


@both
def fail(message: str = "as told") -> None:
    raise ValueError(message)


@both
def noted(value: Any, path: str) -> Any:
    """Return ``value``, and leave a line of it in the file at each run."""
    note(path, value)
    return value


@both
def noted_sum(numbers: Iterable[Any], path: str) -> Any:
    """A body that leaves a line at each run."""
    total = sum(numbers)
    note(path, total)
    return total


@both
def noted_error(request_id: str, path: str) -> None:
    """An errback of one argument: ``noted_error.s(path)``."""
    note(path, request_id)


@both
def sleepy(value: Any, gate: str, started: str | None = None, deadline: float = 60.0) -> Any:
    """Return ``value`` once the file ``gate`` exists; leave a line in ``started`` at once."""
    if started:
        note(started, value)
    wait_until(Path(gate).exists, deadline, f"{gate} exists")
    return value


@both
def paused(value: Any, seconds: float) -> Any:
    """Return ``value`` after a while: for tests that share no files with their workers."""
    threading.Event().wait(seconds)
    return value


@both
def stubborn(value: Any, deadline: float = 60.0) -> Any:
    """Wait for a soft time limit; return ``value`` when it comes."""
    try:
        wait_until(lambda: False, deadline, "a soft time limit")
    except SoftTimeLimitExceeded:
        return value


@both
def crash(code: int = 1) -> None:
    """End the process that runs it, every time."""
    os._exit(code)


@both
def crash_once(value: Any, path: str) -> Any:
    """End the process at the first run, return ``value`` at the next."""
    if first(path):
        os._exit(1)
    return value


@both
def kill_once(value: Any, path: str) -> Any:
    """As ``crash_once``, by SIGKILL."""
    if first(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return value


@both(bind=True, default_retry_delay=0, max_retries=None)
def retry_until(self: celery.Task, value: Any, times: int) -> Any:
    """Retry ``times`` times, then return ``value``."""
    if self.request.retries < times:
        raise self.retry()
    return value


@both(bind=True)
def replaced(self: celery.Task, signature: dict[str, Any]) -> Any:
    """Run another signature in this task's place."""
    return self.replace(self.app.signature(signature))


#: What ``hooked`` tasks run, for tests whose tasks run in their own process.
hooks: dict[str, Callable[..., Any]] = {}


@both(bind=True, max_retries=None)
def hooked(self: celery.Task, value: Any, name: str) -> Any:
    """Return what ``hooks[name](task, value)`` returns, ``value`` where that is None."""
    result = hooks[name](self, value)
    return value if result is None else result


@both(bind=True, max_retries=None, ignore_result=True)
def hooked_ignored(self: celery.Task, value: Any, name: str) -> Any:
    """As ``hooked``, with its result ignored."""
    return hooks[name](self, value)


@both(bind=True, max_retries=None, acks_late=True)
def hooked_late(self: celery.Task, value: Any, name: str) -> Any:
    """As ``hooked``, acknowledged late."""
    result = hooks[name](self, value)
    return value if result is None else result


@both
def unserializable() -> Any:
    """Return what JSON has no form for."""
    return object()


@both
def noted_failure(request: Any, exc: BaseException, traceback: Any, path: str = "") -> None:
    """An errback of three arguments: ``noted_failure.s(path=...)``."""
    note(path, f"{request.id} {type(exc).__name__}")


@both
def flat_sum(values: Iterable[Any]) -> Any:
    """Sum numbers in lists of any depth."""
    return sum(flat_sum(value) if isinstance(value, list) else value for value in values)
