"""Members of one barrier that finish in many processes at once, without a worker around them."""

from __future__ import annotations

import gc
import json
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

from celery import chord
from celery.app.task import Context

from benchmarks.app import app
from benchmarks.tasks import body, member


def finish(size: int, processes: int, queue: str) -> float:
    """Call a chord, let ``processes`` share its members; members finished per second.

    Taking the messages and claiming them is not counted: only ``mark_as_done``, which stores the
    result and counts the member.  Nor is Python's full collection of what the imports left, 60 ms
    in each process, which would come in the middle of its hundred members.
    """
    context = multiprocessing.get_context("fork")
    ready, found = context.Barrier(processes), context.Queue()
    share = [size // processes + (n < size % processes) for n in range(processes)]
    work = [context.Process(target=_finisher, args=(n, queue, ready, found)) for n in share]
    opener = context.Process(target=_open, args=(size, queue))
    opener.start()
    opener.join()
    for process in work:
        process.start()
    times = [found.get(timeout=300) for _ in work]
    for process in work:
        process.join()
    return size / (max(end for _, end in times) - min(begin for begin, _ in times))


def _open(size: int, queue: str) -> None:
    last = body.s("nobody").set(queue=f"{queue}-body")
    chord([member.s().set(queue=queue) for _ in range(size)])(last)


def _finisher(count: int, queue: str, ready: Any, found: Any) -> None:
    requests = [_claimed(request) for request in _take(count, queue)]
    mark_as_done = app.backend.mark_as_done
    if requests:
        app.backend.get_state(requests[0].id)  # a connection that is open
    gc.collect()
    ready.wait(120)
    begun = time.time()
    for request in requests:
        mark_as_done(request.id, 1.0, request=request)
    found.put((begun, time.time()))


def _take(count: int, queue: str) -> list[Context]:
    requests: list[Context] = []
    with app.connection() as connection, connection.channel() as channel:
        deadline = time.monotonic() + 30
        while len(requests) < count:
            message = channel.basic_get(queue, no_ack=True)
            if message is None:  # RabbitMQ may not have taken in yet what was published last
                assert time.monotonic() < deadline, f"{queue} has run out of messages"
                continue
            args, kwargs, embed = json.loads(message.body)
            headers = {**message.headers, **embed}
            requests.append(Context(headers, args=args, kwargs=kwargs, called_directly=False))
    return requests


def _claimed(request: Context) -> Context:
    claim = getattr(app.backend, "claim", None)
    if claim is not None:
        from celery_pgbarrier.capture import ATTEMPT

        setattr(request, ATTEMPT, claim(app.tasks[request.task], request))
    return request


FUNCTIONS: dict[str, Callable[..., Any]] = {"finish": finish}
