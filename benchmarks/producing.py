"""What a peer's producer is asked to do; each function runs in a process of that peer's alone."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import chain, chord, group
from celery.result import AsyncResult

from benchmarks.app import app
from benchmarks.tasks import RECORD, body, channel, member, noted, short

PATIENCE = 300


def _wait(key: str) -> Any:
    reply = channel(os.getpid()).blpop([key], timeout=PATIENCE)
    if reply is None:
        raise TimeoutError(f"nothing was told to {key} in {PATIENCE} s")
    return json.loads(reply[1])


def _new_key() -> str:
    return f"{os.environ['BENCH_RUN']}:{uuid.uuid4().hex}"


def chords(size: int, count: int = 1) -> list[dict[str, float]]:
    """Call chords one after the other: seconds of the call, from call and last member to body."""
    found = []
    for _ in range(count):
        key = _new_key()
        header, last = [member.s() for _ in range(size)], body.s(key)
        begun = time.time()
        chord(header)(last)
        called = time.time()
        started, ended, seen = _wait(key)
        assert seen == size, f"the body got {seen} of {size} results"
        found.append({"call": called - begun, "total": started - begun, "last": started - ended})
    return found


def storm(count: int, size: int) -> dict[str, float]:
    """Call many chords at once: seconds until all are called, and until the last body starts."""
    key = _new_key()
    canvases = [chord([member.s() for _ in range(size)], body.s(key)) for _ in range(count)]
    begun = time.time()
    for canvas in canvases:
        canvas()
    called = time.time()
    started = max(_wait(key)[0] for _ in range(count))
    return {"call": called - begun, "total": started - begun}


def publish(count: int, queue: str) -> float:
    """Call a task ``count`` times into a queue; the seconds that it took."""
    begun = time.time()
    for number in range(count):
        noted.apply_async((number,), queue=queue)
    return time.time() - begun


def drain(count: int, queue: str, worker: str) -> dict[str, float]:
    """Publish tasks to a queue that nobody consumes, then let the worker run them all.

    Returns tasks per second between the first and the last end, and of publishing.
    """
    published = publish(count, queue)
    seen = _ended()
    app.control.add_consumer(queue, destination=[worker], reply=True, timeout=30)
    ends = _wait_ended(seen + count)[seen:]
    app.control.cancel_consumer(queue, destination=[worker], reply=True, timeout=30)
    return {
        "run": (len(ends) - 1) / (max(ends) - min(ends)),
        "publish": count / published,
    }


def flow(count: int) -> float:
    """Publish tasks while the worker runs them; tasks per second from first call to last end."""
    seen = _ended()
    begun = time.time()
    publish(count, app.conf.task_default_queue)
    return count / (max(_wait_ended(seen + count)[seen:]) - begun)


def chains(count: int, steps: int) -> float:
    """Call chains while the worker runs them; tasks per second from first call to last end."""
    seen = _ended()
    begun = time.time()
    for _ in range(count):
        chain(noted.si(number) for number in range(steps))()
    return count * steps / (max(_wait_ended(seen + count * steps)[seen:]) - begun)


def _ended() -> int:
    path = Path(os.environ["BENCH_ENDS"])
    return path.stat().st_size // RECORD.size if path.exists() else 0


def _wait_ended(count: int) -> list[float]:
    deadline = time.time() + PATIENCE
    while _ended() < count:
        if time.time() > deadline:
            raise TimeoutError(f"{_ended()} of {count} tasks ended in {PATIENCE} s")
        time.sleep(0.02)
    data = Path(os.environ["BENCH_ENDS"]).read_bytes()
    return [value for (value,) in RECORD.iter_unpack(data)]


def latency(count: int) -> list[float]:
    """Call a task of a millisecond and get its result, one after the other; seconds each."""
    took = []
    for _ in range(count):
        begun = time.perf_counter()
        short.delay().get(timeout=PATIENCE)
        took.append(time.perf_counter() - begun)
    return took


def join(count: int) -> float:
    """Seconds to get ``count`` results that are finished."""
    seen = _ended()
    result = group(noted.s(number) for number in range(count))()
    _wait_ended(seen + count)
    time.sleep(0.5)  # the last outcome is stored after its task's end
    begun = time.perf_counter()
    values = result.get(timeout=PATIENCE)
    took = time.perf_counter() - begun
    assert sorted(values) == list(range(count))
    return took


def wait_for_nothing(callers: int, seconds: float) -> dict[str, Any]:
    """Let threads wait for results that never come; how many did, CPU seconds, errors."""
    errors: list[str] = []
    started = threading.Barrier(callers + 1)

    def call() -> None:
        result = AsyncResult(uuid.uuid4().hex, app=app)
        started.wait()
        try:
            result.get(timeout=seconds)
        except Exception as error:
            if type(error).__name__ != "TimeoutError" or "timed out" not in str(error):
                errors.append(f"{type(error).__name__}: {error}"[:200])

    threads = [threading.Thread(target=call, daemon=True) for _ in range(callers)]
    for thread in threads:
        thread.start()
    started.wait()
    begun, cpu = time.time(), time.process_time()
    for thread in threads:
        thread.join(seconds * 3)
    return {
        "seconds": time.time() - begun,
        "cpu": time.process_time() - cpu,
        "left": sum(thread.is_alive() for thread in threads),
        "errors": errors[:3],
        "failed": len(errors),
    }


def dispatch(size: int, queue: str) -> dict[str, float]:
    """Call one chord into a queue that nobody consumes: seconds, peak memory before and after."""
    header = [member.s().set(queue=queue) for _ in range(size)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.time()
    chord(header)(body.s(_new_key()).set(queue=queue))
    took = time.time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": took, "before": before / 1024, "peak": peak / 1024}


def ping() -> int:
    """Show that the process is there; its pid."""
    return os.getpid()


#: By the names under which the harness calls them.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        chords, storm, publish, drain, flow, chains, latency, join, wait_for_nothing, dispatch,
        ping,
    )
}  # fmt: skip
