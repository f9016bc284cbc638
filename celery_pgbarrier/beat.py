"""The reaper as a beat task: the second line behind the workers' own threads."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from celery import Celery
from celery.app.task import Task

from celery_pgbarrier import reaper
from celery_pgbarrier.settings import OPTIONS

REAP = "celery_pgbarrier.reap"


def register(app: Celery) -> None:
    """Register the reap task with an app; it is never a ``BarrierTask`` and never recorded."""
    if REAP in app._tasks:
        return

    def reap() -> dict[str, int]:
        """Do one reaper pass; see :func:`celery_pgbarrier.reaper.run_once`."""
        return asdict(reaper.run_once(app.backend))

    app.task(name=REAP, base=Task, ignore_result=True, acks_late=False, shared=False)(reap)


def beat_schedule(
    schedule: Any = None, queue: str | None = None, **overrides: Any
) -> dict[str, dict[str, Any]]:
    """Return the beat entry that runs the reaper, for ``app.conf.beat_schedule``.

    A message that waited for longer than the interval expires: reaper messages never pile up.

    Parameters:
        schedule: seconds, ``timedelta`` or ``crontab``; 15 s, the reaper's default interval.
        queue: the queue of the task, for workers that should not wait behind a backlog.
        overrides: further keys of the entry; ``options`` are merged.
    """
    interval = next(option.default for option in OPTIONS if option.name == "reap_interval")
    schedule = interval if schedule is None else schedule
    seconds = schedule if isinstance(schedule, (int, float)) else interval
    options: dict[str, Any] = {"expires": seconds}
    if queue is not None:
        options["queue"] = queue
    options.update(overrides.pop("options", {}))
    return {REAP: {"task": REAP, "schedule": schedule, "options": options, **overrides}}
