"""Outcomes: every end of a task passes one gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import states
from celery.app.task import Context
from celery.utils.log import get_logger

from celery_pgbarrier import ahead, barrier, capture, compat, lease, poison
from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.errors import DatabaseUnavailable, DispatchConflict, TaskPoisoned
from celery_pgbarrier.lease import Attempt, Held
from celery_pgbarrier.results import Results
from celery_pgbarrier.unit import STAMP, Outcome, Poison, Stamp, Unit, all_ids

logger = get_logger(__name__)

#: How long the worker's parent waits for PostgreSQL before it leaves a task to the audit (seconds).
PARENT_PATIENCE = 2.0


class Outcomes(Results):
    """The part of the backend through which tasks end."""

    def mark_as_done(
        self,
        task_id: str,
        result: Any,
        request: Any = None,
        store_result: bool = True,
        state: str = states.SUCCESS,
    ) -> None:
        """Commit a task's success with all that follows from it, if its claim still holds."""

        def record() -> None:
            super(Outcomes, self).mark_as_done(task_id, result, request, store_result, state)

        self._conclude(task_id, request, record, result, state)

    def mark_as_failure(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = states.FAILURE,
    ) -> None:
        """Commit a task's failure, that of its chain and its errbacks, if its claim still holds."""
        if request is not None and not hasattr(request, "chain"):
            # A message that the worker does not know the task of: all it tells is the id.
            request = self._recorded_request(task_id) or request

        def record() -> None:
            super(Outcomes, self).mark_as_failure(
                task_id, exc, traceback, request, store_result, call_errbacks, state
            )
            self._fail_steps(request, exc, state)

        self._conclude(task_id, request, record, exc, state)

    def mark_as_revoked(
        self,
        task_id: str,
        reason: str = "",
        request: Any = None,
        store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:
        """Commit a task's revocation and that of the steps after it."""

        if request is None:  # the remote control knows only the id
            request = self._recorded_request(task_id)

        def record() -> None:
            super(Outcomes, self).mark_as_revoked(task_id, reason, request, store_result, state)
            self._fail_steps(request, compat.revoked(reason), state)

        self._conclude(task_id, request, record, compat.revoked(reason), state)

    def _fail_steps(self, request: Any, exc: BaseException, state: str) -> None:
        """Fail the steps after a failed task that Celery has not failed already.

        Without it, the chord of a chain whose last step is a canvas would wait for ever.
        """
        unit = capture.recording()
        if unit is None:
            return
        for step in getattr(request, "chain", None) or ():
            for task_id in all_ids(step):
                self._hidden(unit, task_id, exc, state, None, visible=True)

    def on_chord_part_return(self, request: Any, state: str, result: Any, **options: Any) -> None:
        """Count a member that stores no result; the others are counted with their outcome."""
        unit = capture.recording()
        if unit is not None and request.id:
            self._hidden(unit, request.id, result, state, request)

    def _hidden(
        self,
        unit: Unit,
        task_id: str,
        result: Any,
        state: str,
        request: Any,
        visible: bool = False,
        needed: bool = True,
    ) -> None:
        """Record an outcome that Celery does not store; *needed*: a chord wants its value."""
        if task_id in unit.outcomes:
            return
        meta = None
        if needed:
            meta = self._meta(self.encode_result(result, state), state, None, request)
        unit.outcomes[task_id] = Outcome(task_id, state, meta, visible)

    def _conclude(
        self, task_id: str, request: Any, record: Callable[[], None], result: Any, state: str
    ) -> None:
        """Record an outcome as one unit and commit it through its fence."""
        if capture.recording() is not None or getattr(request, "is_eager", False):
            record()
            return
        attempt = capture.attempt_of(request)
        if attempt is not None and attempt.phase == "closed":
            return
        unit = Unit(_call_of(request))
        if attempt is not None and state == states.SUCCESS:
            unit = attempt.unit
        if isinstance(result, TaskPoisoned):
            unit.poison = Poison(task_id, getattr(request, "task", None), str(result))
        with capture.into(unit, outcomes=True):
            record()
            if attempt is not None or capture.is_recorded(task_id, request):
                member = attempt is not None and attempt.barrier_id is not None
                needed = member or bool(getattr(request, "chord", None))
                self._hidden(unit, task_id, result, state, request, needed=needed)
        primary = unit.outcomes.pop(task_id, None)
        if primary is None and unit.plain:
            for errback in unit.inline:
                errback()
            return
        if primary is not None:
            primary.fence = capture.fence_for(task_id, request)
            unit.primary = primary
        self._commit(unit, attempt, task_id)

    def _commit(self, unit: Unit, attempt: Attempt | None, task_id: str) -> None:
        if attempt is not None and _left_to_parent(unit, attempt):
            attempt.phase = "closed"
            return
        given_up = None
        committed = None
        try:
            committed = barrier.commit(self, unit, self._patience(unit))
        except DatabaseUnavailable as error:
            given_up = error
        if attempt is not None:
            attempt.phase = "closed"
        if committed is not None:
            if unit.poison is not None:
                poison.announce(self, unit.poison)
            barrier.follow(self, unit, committed)
        elif given_up is not None:
            # No outcome of the task: its claim is released by the audit and it runs again.
            logger.error("The outcome of task %s is given up: %s", task_id, given_up)
        else:
            logger.warning("An outcome of task %s was refused: another run of it stands", task_id)

    def _patience(self, unit: Unit) -> float:
        """Return how long an outcome waits: the worker's parent has other tasks to look after."""
        primary = unit.primary
        if isinstance(primary, Outcome) and primary.fence.worker is not None:
            return PARENT_PATIENCE
        return self._settings.outcome_timeout

    def _call_task_errbacks(self, request: Any, exc: Any, traceback: Any) -> None:
        unit = capture.recording()
        if unit is None:
            super()._call_task_errbacks(request, exc, traceback)
            return
        inline, sent = compat.split_errbacks(self.app, self, request.errbacks)
        call = super()._call_task_errbacks
        if sent:
            call(_with_errbacks(request, sent), exc, traceback)
        if inline:
            unit.inline.append(lambda: call(_with_errbacks(request, inline), exc, traceback))

    def _recorded_request(self, task_id: str) -> Context | None:
        """Return the request that a worker would make of a task's recorded message."""
        return recorded_request(lease.inspect(self, task_id, PARENT_PATIENCE))

    def closing_unit(
        self, closing: barrier.Closing, refused: DispatchConflict | None = None
    ) -> tuple[str, Unit]:
        """Return what a complete chord leads to; see :mod:`celery_pgbarrier.backend`."""
        raise NotImplementedError


def recorded_request(row: Held | None) -> Context | None:
    """Return the request that a worker would make of a row's message, None without one."""
    if row is None or row.message is None:
        return None
    return Context(Envelope.decode(row.message).request())


def _left_to_parent(unit: Unit, attempt: Attempt) -> bool:
    """Leave a success from which at most messages follow to the worker's parent, if it takes it."""
    primary = unit.primary
    success = isinstance(primary, Outcome) and primary.status == states.SUCCESS
    return success and unit.plain_messages and ahead.leave(unit, attempt)


def _call_of(request: Any) -> str | None:
    _, stamp = Stamp.read(getattr(request, STAMP, None))
    return None if stamp is None else stamp.call


def _with_errbacks(request: Any, errbacks: list[Any]) -> Context:
    return Context({**vars(request), "errbacks": errbacks})
