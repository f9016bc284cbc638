"""Claims that tests take and lose on purpose."""

from __future__ import annotations

from typing import Any

from celery import chord
from celery.app.task import Context

from celery_pgbarrier import lease, reaper
from celery_pgbarrier.backend import BarrierBackend
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import add, identity


def claim(backend: BarrierBackend, worker: InlineWorker, request: Any) -> lease.Attempt:
    """Claim a message that was taken, and do nothing about it."""
    args, kwargs, embed = request._payload
    context = Context({**request.request_dict, **embed}, args=args, kwargs=kwargs)
    with worker.identity():
        return backend.claim(request.task, context)


def member_of_a_chord(worker: InlineWorker, canvas: Any) -> tuple[Any, Any]:
    """Start a chord of two members; its result, and the message of the first."""
    result = chord([canvas, add.s(1, 1)], identity.s()).delay()
    first, second = worker.take_all()
    worker.run(second)
    return result, first


def bury(backend: BarrierBackend, worker: InlineWorker, tables: Tables) -> reaper.Counts:
    """Let a worker be silent until both looks have found it dead."""
    with worker.identity():
        lease.beat(backend)
    tables.silence(worker.boot.id)
    reaper.run_once(backend)
    tables.silence(worker.boot.id)
    return reaper.run_once(backend)
