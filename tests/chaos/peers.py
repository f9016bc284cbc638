"""The same fault points in Celery's own backends, and word of what they have stored.

A point is passed at the moment that its description in ``celery_pgbarrier.faults`` names, as far
as these backends have such a moment; the reaper's points have none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from celery import Celery, states

from celery_pgbarrier import faults
from tests.chaos import ledger
from tests.chaos.tasks import BODY, MEMBER

EVENTS = {states.SUCCESS: "stored", states.FAILURE: "failed"}


def install(app: Celery) -> None:
    """Make an app's backend and its messages pass the points."""
    backend = type(app.backend)
    backend.store_result = _store_result(backend.store_result)
    backend.apply_chord = _apply_chord(backend.apply_chord)
    app.amqp.send_task_message = _send(app.amqp.send_task_message)


def _store_result(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def store_result(
        self: Any, task_id: str, result: Any, state: str, *rest: Any, **more: Any
    ) -> Any:
        if state == states.SUCCESS:
            faults.point("body.returned")
        value = original(self, task_id, result, state, *rest, **more)
        if state in EVENTS:
            ledger.note(task_id, EVENTS[state])
        if state == states.SUCCESS:
            faults.point("finish.committed")
        return value

    return store_result


def _apply_chord(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def apply_chord(self: Any, *rest: Any, **more: Any) -> Any:
        faults.point("dispatch.captured")
        value = original(self, *rest, **more)
        faults.point("dispatch.committed")
        return value

    return apply_chord


def _send(original: Callable[..., Any]) -> Callable[..., Any]:
    def send_task_message(producer: Any, name: str, *rest: Any, **more: Any) -> Any:
        if name == BODY:
            faults.point("release.committed")
        value = original(producer, name, *rest, **more)
        if name == MEMBER:
            faults.point("dispatch.half-published")
        return value

    return send_task_message
