"""Tasks that are no ``BarrierTask`` but have a row: chord members, and what was recorded.

They hold no claim.  Their row tells that they run and where, so that their message is not published
again; when their process dies, they fail as in Celery, or run again where they have ``acks_late``.
"""

from __future__ import annotations

from typing import Any

from celery.exceptions import Ignore, Reject
from celery.signals import task_postrun, task_prerun

from celery_pgbarrier import compat, lease
from celery_pgbarrier.errors import MemberEndedWithoutResult
from celery_pgbarrier.store import sql
from celery_pgbarrier.unit import STAMP, Stamp


def has_row(task: Any) -> bool:
    """Tell whether a running task is a plain one with a row."""
    request = task.request
    if getattr(task, "pgbarrier_claims", False) or request.called_directly or request.is_eager:
        return False
    _, stamp = Stamp.read(getattr(request, STAMP, None))
    recorded = stamp is not None and stamp.recorded
    return (recorded or bool(request.chord)) and hasattr(task.backend, "process_lost")


def sends_itself(task_id: str | None, headers: Any) -> None:
    """End a plain task's run before its retry or replacement, which carries its id, is sent."""
    task = compat.current_task()
    if task is None or task.request.id != task_id or not has_row(task):
        return
    if int(headers.get("retries") or 0) > task.request.retries:
        _retried(task, headers.get("eta"))
    else:
        replaced(task)


def replaced(task: Any) -> None:
    """The id of a running plain task waits for the message or the chord that replaces it."""
    _write(task, sql.PLAIN_REPLACED, {})


def _retried(task: Any, eta: str | None) -> None:
    after = task.backend.settings.republish_after
    _write(task, sql.PLAIN_RETRIED, {"eta": eta, "after": after})


def _write(task: Any, statement: str, parameters: dict[str, Any]) -> None:
    me, backend = lease.holder(), task.backend
    parameters = {
        "id": task.request.id,
        "worker": me.worker,
        "pid": me.pid,
        "thread": me.thread,
        **parameters,
    }
    backend.database.count(statement, parameters, backend.settings.outcome_timeout)


def _on_prerun(task: Any = None, **_: Any) -> None:
    """Record a plain task's start: from here on its message is not published again."""
    if has_row(task):
        lease.boot.current()
        rerun = bool(task.acks_late)
        _write(task, sql.PLAIN_STARTED, {"rerun": rerun, "worker_name": lease.boot.name})


def _on_postrun(task: Any = None, retval: Any = None, state: str | None = None, **_: Any) -> None:
    """Settle a plain task that ended without an outcome."""
    if state not in ("IGNORED", "REJECTED") or not has_row(task):
        return
    request = task.request
    if isinstance(retval, Ignore) and "Replaced by new task" in str(retval):
        replaced(task)
    elif isinstance(retval, Reject) and retval.requeue:
        _retried(task, None)
    elif isinstance(retval, Reject):
        task.backend.mark_as_failure(request.id, retval, request=request)
    elif request.chord:
        error = MemberEndedWithoutResult(
            f"{task.name}[{request.id}] ended with Ignore and no result: "
            "a chord needs a result or an error of each member"
        )
        task.backend.mark_as_failure(request.id, error, request=request)
    else:
        task.backend.mark_as_done(request.id, None, request=request, store_result=False)


task_prerun.connect(_on_prerun, weak=False)
task_postrun.connect(_on_postrun, weak=False)
