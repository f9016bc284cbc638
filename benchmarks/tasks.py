"""The tasks of all peers, and how they tell the harness what happened.

Times are ``time.time()`` of one machine, so those of different processes may be compared. What is
reported goes past the backend that is measured: the end of a task to a file, a body's start to a
list in Redis.
"""

from __future__ import annotations

import json
import os
import struct
import time
from functools import cache
from typing import Any

import redis
from celery import shared_task, signals

RECORD = struct.Struct("d")


@cache
def channel(pid: int) -> redis.Redis:
    """The way back to the harness; one connection a process."""
    return redis.Redis.from_url(os.environ["BENCH_CHANNEL"], socket_timeout=None)


def tell(key: str, value: Any) -> None:
    """Send a value to whoever waits for ``key``."""
    channel(os.getpid()).lpush(key, json.dumps(value))


@cache
def _ends(pid: int) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    return os.open(os.environ["BENCH_ENDS"], flags, 0o644)


@shared_task(name="bench.member")
def member() -> float:
    """A chord member whose result is when it ended."""
    return time.time()


@shared_task(name="bench.body")
def body(ends: list[float], key: str) -> int:
    """A chord's body: tells when it started and when the last member had ended."""
    started = time.time()
    tell(key, [started, max(ends), len(ends)])
    return len(ends)


@shared_task(name="bench.noted")
def noted(value: int = 0) -> int:
    """A task that does nothing and notes when it ended."""
    os.write(_ends(os.getpid()), RECORD.pack(time.time()))
    return value


@shared_task(name="bench.short")
def short() -> int:
    """A task of a millisecond."""
    time.sleep(0.001)
    return 1


@signals.task_received.connect(weak=False)
def _received(request: Any, **_: Any) -> None:
    """Tell how large the message of a body was."""
    if request.name == "bench.body":
        tell(f"{os.environ['BENCH_RUN']}:body-bytes", len(request.body))
