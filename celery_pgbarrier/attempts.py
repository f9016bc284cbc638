"""Attempts: claimed by a pool process, handed over, given back, settled when it died."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from celery import states
from celery.app.task import Context
from celery.exceptions import Ignore, Reject
from celery.utils.log import get_logger
from kombu.serialization import dumps
from kombu.utils.encoding import ensure_bytes

from celery_pgbarrier import ahead, capture, compat, faults, lease, reaper, reference
from celery_pgbarrier.clerk import now
from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.errors import DatabaseUnavailable, MessageUnreadable, PgBarrierError
from celery_pgbarrier.lease import Attempt, Claim, Held, Loss, Verdict
from celery_pgbarrier.outcomes import PARENT_PATIENCE, Outcomes, recorded_request
from celery_pgbarrier.reference import Reference
from celery_pgbarrier.request import CONTENT
from celery_pgbarrier.unit import GRANT, NO_PROCESS, STAMP, Fence, Stamp, Unit

logger = get_logger(__name__)


class Attempts(Outcomes):
    """The part of the backend that runs of a ``BarrierTask`` talk to."""

    def claim(self, task: Any, request: Any) -> Attempt:
        """Claim a task that is about to run in this thread.

        Raises:
            celery.exceptions.Ignore: the message is a duplicate or an old copy.
            celery.exceptions.Reject: PostgreSQL was away for ``pgbarrier_outcome_timeout``.
        """
        stamp, grant = Stamp.of(request.id, request.get(STAMP)), request.get(GRANT)
        attempt = ahead.attempt_from(grant, request.id, stamp, self._settings.heartbeat)
        if attempt is not None:
            attempt.ahead = not task.acks_late
            faults.point("claim.granted")
            return attempt
        started = task.track_started and not request.ignore_result
        meta = {"pid": lease.holder().pid, "hostname": request.hostname}
        wanted = Claim(
            task_id=request.id,
            stamp=stamp,
            name=task.name,
            status=states.STARTED if started else None,
            result=self._meta(meta, states.STARTED, None, request) if started else None,
            envelope=lambda: self._own_envelope(request),
            token=ahead.token_from(grant, stamp),
            again=not ahead.has_left(request.id),
        )
        try:
            verdict, attempt = lease.claim(self, wanted)
        except DatabaseUnavailable as error:
            raise Reject(error, requeue=True) from error
        if verdict is Verdict.PURGED:
            logger.warning("A late copy of task %s is dropped: %s", request.id, verdict.value)
        if attempt is None:
            raise Ignore(f"not run: {verdict.value}")
        if not task.acks_late:
            attempt.claimed_at = now()
        return attempt

    def _own_envelope(self, request: Any) -> Envelope:
        """Make a running task's message again, so that it can be put back."""
        content_type, _ = request.get(CONTENT) or (None, None)
        serializer = compat.serializer_for(content_type) or self.app.conf.task_serializer
        embed = {key: request.get(key) for key in ("callbacks", "errbacks", "chain", "chord")}
        body = (request.args or (), request.kwargs or {}, embed)
        content_type, encoding, payload = dumps(body, serializer)
        delivery = request.delivery_info or {}
        return Envelope.delivered(
            ensure_bytes(payload),
            (content_type, encoding),
            compat.message_headers(request),
            delivery,
            correlation_id=request.correlation_id,
            reply_to=request.reply_to,
            priority=delivery.get("priority"),
        )

    def read_results(self, found: Reference, lazy: bool) -> Any:
        """Return the results of a chord that a running task got by reference."""
        return reference.read(self, found, lazy)

    def retry_meta(self, task: Any, request: Any, retry: Any) -> tuple[str | None, bytes | None]:
        """Return the state and metadata that a retry leaves, None where results are ignored."""
        if request.ignore_result and not task.store_errors_even_if_ignored:
            return None, None
        result = self.encode_result(retry.exc, states.RETRY)
        return states.RETRY, self._meta(result, states.RETRY, None, request)

    def hand_over(self, attempt: Attempt, unit: Unit) -> None:
        """Commit the end of an attempt by retry or replace, then publish what goes on."""
        self._commit(unit, attempt, attempt.task_id)

    def give_back(self, attempt: Attempt) -> None:
        """Put a task back that rejected its message; the broker or the reaper brings it again."""
        attempt.phase = "closed"
        held = Held(attempt.task_id, "running", attempt.token)
        lease.put_back(self, held, False, self._settings.outcome_timeout, publish_now=False)

    def abandon(self, attempt: Attempt) -> None:
        """End an attempt that left no outcome (a bare ``Ignore`` of a task in no chord)."""
        attempt.phase = "closed"
        lease.abandon(self, attempt)

    def process_lost(
        self, task_id: str, stamp: Stamp, pid: int | None, name: str, token: str | None = None
    ) -> Loss:
        """Settle a task whose pool process died; called in the worker's parent.

        Parameters:
            token: that of the claim which the parent made for it.

        Raises:
            DatabaseUnavailable: PostgreSQL is away; the audit settles it later.
        """
        # It may have left its outcome before it died.
        if ahead.current is not None and not ahead.current.clerk.flush(PARENT_PATIENCE):
            raise DatabaseUnavailable("outcomes wait for PostgreSQL")
        held = lease.inspect(self, task_id, PARENT_PATIENCE)
        if held is None:
            return Loss.UNKNOWN
        if held.state == "done":
            return Loss.FINISHED
        if held.state == "expected" and held.call == stamp.call and held.seq > stamp.seq:
            return Loss.ELSEWHERE  # it had replaced itself: the replacement carries it on
        if held.state in ("expected", "untracked"):
            return Loss.UNKNOWN
        if not held.is_of(stamp, lease.boot.current(), pid, token):
            return Loss.ELSEWHERE
        loss = lease.put_back(self, held, lease.boot.state == "running", PARENT_PATIENCE)
        if loss is Loss.SPENT:
            self.fail_recorded(task_id, held.token, reaper.crashed(self, name))
        return loss

    def unreadable(self, headers: Mapping[str, Any], name: str, error: Exception) -> None:
        """Fail a recorded task whose message this worker cannot read."""
        task_id = headers.get("id")
        stamp = Stamp.of(str(task_id), headers.get(STAMP))
        if task_id and stamp.recorded:
            reason = f"a worker cannot read the message of {name}: {error!r}"
            self.fail_unclaimed(task_id, stamp, MessageUnreadable(reason))

    def fail_unclaimed(self, task_id: str, stamp: Stamp, error: PgBarrierError) -> None:
        """Fail a task that nobody has claimed, unless its row has gone on since *stamp*."""
        worker = lease.boot.current()
        fence = partial(Fence, worker=worker, pid=NO_PROCESS, stamp=stamp)
        with capture.parent_fence(task_id, fence):
            self.fail_recorded(task_id, None, error)

    def fail_recorded(self, task_id: str, token: str | None, error: Exception) -> bool:
        """Fail a task on the reaper's word, from its recorded message."""
        row = lease.inspect(self, task_id, PARENT_PATIENCE)
        request = _request_of(row) or Context({"id": task_id})
        if token is not None and row is not None and row.call is not None:
            stamp = Stamp(row.call, row.seq, True)
            attempt = Attempt(task_id, stamp, token, 0, row.barrier_id, Unit(stamp.call))
            attempt.phase = "ended"
            setattr(request, capture.ATTEMPT, attempt)
        self.mark_as_failure(task_id, error, request=request)
        return True


def _request_of(row: Held | None) -> Context | None:
    """Return the request of a row's message; None where there is none or nobody can read it."""
    try:
        return recorded_request(row)
    except Exception as error:
        logger.error("The recorded message of a task cannot be read: %r", error)
        return None
