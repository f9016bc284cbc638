"""The worker parent's view of a ``BarrierTask`` message."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import WorkerLostError
from celery.utils.log import get_logger
from celery.worker.request import Request
from celery.worker.state import task_ready

from celery_pgbarrier import capture, lease
from celery_pgbarrier.clerk import Grant
from celery_pgbarrier.lease import Loss
from celery_pgbarrier.unit import GRANT, NO_PROCESS, STAMP, Fence, Stamp

logger = get_logger(__name__)

#: The request field that tells the child how its message was serialised.
CONTENT = "pgb_content"


class BarrierRequest(Request):  # type: ignore[misc]
    """A request whose outcomes, where the parent writes them, are fenced by its pool child."""

    #: The claim that was made ahead of its run, once it is sent to the pool.
    grant: Grant | None = None

    def __init__(self, message: Any, **options: Any) -> None:
        try:
            super().__init__(message, **options)
        except Exception as error:
            self._unreadable(error, **options)
            raise
        # Celery passes unknown fields of a request on to the message of its retry.
        self._request_dict.pop(GRANT, None)
        self._request_dict[CONTENT] = [self._content_type, self._content_encoding]

    @staticmethod
    def _unreadable(
        error: Exception, app: Any = None, headers: Any = None, task: Any = None, **_: Any
    ) -> None:
        """Fail a task whose message cannot be read here; Celery would only log it."""
        try:
            app.backend.unreadable(headers or {}, task.name, error)
        except Exception as trouble:
            logger.error("A message that cannot be read is settled later: %s", trouble)

    @cached_property
    def stamp(self) -> Stamp:
        """The stamp of the message in hand."""
        return Stamp.of(self.id, self._request_dict.get(STAMP))

    def hand_over(self, grant: Grant) -> None:
        """Let the pool process run the task under a claim that was made ahead."""
        self.grant = grant
        self._request_dict[GRANT] = grant.field()

    def _fenced(self) -> Any:
        return capture.parent_fence(self.id, self._fence)

    def _fence(self) -> Fence:
        if self.grant is not None:
            return self.grant.fence()
        pid = self.worker_pid or NO_PROCESS
        return Fence(worker=lease.boot.current(), pid=pid, stamp=self.stamp)

    def revoked(self) -> Any:
        """Skip a revoked or expired task; a copy never revokes the run of another process."""
        with self._fenced():
            return super().revoked()

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Terminate the pool child that runs the task."""
        with self._fenced():
            super().terminate(pool, signal)

    def cancel(self, pool: Any, signal: Any = None, **options: Any) -> None:
        """End the run of a task whose broker connection was lost: no crash of the task."""
        lease.boot.cancelled.add(self.id)
        with self._fenced():
            super().cancel(pool, signal, **options)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Store a hard time limit, unless an outcome stands."""
        with self._fenced():
            super().on_timeout(soft, timeout)

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        """Put a task back whose process died; leave every other failure to Celery."""
        with self._fenced():
            if self._process_lost(exc_info) and self._put_back():
                return None
            return super().on_failure(exc_info, send_failed_event, return_ok)

    def _process_lost(self, exc_info: Any) -> bool:
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if self._already_cancelled or self._already_revoked:
            return False
        return isinstance(error, (WorkerLostError, SystemExit, KeyboardInterrupt))

    def _put_back(self) -> bool:
        """Settle the task of a lost process; False where Celery's own handling is to follow."""
        try:
            token = self.grant.token if self.grant else None
            loss = self.task.backend.process_lost(
                self.id, self.stamp, self.worker_pid, self.name, token
            )
        except Exception as error:
            # The audit of the next heartbeats settles it.
            logger.error("Task %s lost its process and is settled later: %s", self.id, error)
            loss = Loss.ELSEWHERE
        if loss is Loss.UNKNOWN:
            return False
        logger.warning("Process %s of task %s is gone: %s", self.worker_pid, self.id, loss.value)
        task_ready(self)
        if self.task.acks_late:
            self.acknowledge()
        return True
