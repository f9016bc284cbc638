"""``BarrierBackend``: Celery's result backend calls, translated to results and barriers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

from celery import Celery, states
from celery.app.task import Context
from celery.backends.base import BaseBackend
from celery.canvas import maybe_signature
from celery.exceptions import ChordError, Ignore, ImproperlyConfigured, Reject
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import GroupResult, ResultBase, allow_join_result, result_from_tuple
from celery.utils.log import get_logger
from kombu.serialization import dumps, loads

from celery_pgbarrier import barrier, beat, capture, compat, lease, plain, reaper, worker
from celery_pgbarrier.barrier import Closing
from celery_pgbarrier.dispatch import Envelope
from celery_pgbarrier.errors import DatabaseUnavailable, DispatchConflict
from celery_pgbarrier.lease import Attempt, Claim, Held, Loss, Verdict
from celery_pgbarrier.request import CONTENT
from celery_pgbarrier.settings import Settings, load
from celery_pgbarrier.store import sql
from celery_pgbarrier.store.database import Database, parse_url, safe_url
from celery_pgbarrier.unit import (
    STAMP,
    Addition,
    Barrier,
    Outcome,
    Stamp,
    Unit,
    all_ids,
    leaves,
)

__all__ = ["BarrierBackend"]

logger = get_logger(__name__)

#: First pause of a poll for results, doubled up to the caller's interval (seconds).
_FIRST_POLL = 0.005
#: How long the worker's parent waits for PostgreSQL before it leaves a task to the audit (seconds).
_PARENT_PATIENCE = 2.0
_databases: dict[tuple[Any, ...], Database] = {}


class BarrierBackend(BaseBackend):  # type: ignore[misc]
    """Keeps results, groups and chords in PostgreSQL.

    URL: ``pgbarrier://user:password@host:port/database`` (psycopg2) or
    ``pgbarrier+postgresql+psycopg://...`` (psycopg 3).

    Raises:
        ConfigurationError: a URL, a driver or a ``pgbarrier_*`` setting that cannot be used.
    """

    supports_native_join = True
    supports_autoexpire = False
    supports_result_compression = True
    persistent = True

    def __init__(self, app: Celery, url: str | None = None, **options: Any) -> None:
        super().__init__(app=app, url=url, **options)
        self._settings = load(app.conf)
        self._database = _database(app, url or "", self._settings)
        if app.conf.task_protocol != 2:
            raise ImproperlyConfigured("pgbarrier needs task_protocol = 2")
        capture.install(app)
        worker.install(app)
        beat.register(app)

    def private(self) -> BarrierBackend:
        """Return a backend like this one with a small pool of its own, for a keeper thread."""
        backend = type(self)(app=self.app, url=self.url)
        options = dict(self._database.engine_options)
        if "poolclass" not in options:
            options.update(pool_size=1, max_overflow=1)
        url, settings = self._database.url, self._settings
        backend._database = Database(url, settings.schema, settings.auto_migrate, options)
        return backend

    # -- what the services need

    @property
    def settings(self) -> Settings:
        """The checked ``pgbarrier_*`` settings."""
        return self._settings

    @property
    def database(self) -> Database:
        """The database of this backend, shared by all threads of the process."""
        return self._database

    @property
    def keep(self) -> float | None:
        """Seconds for which finished rows are kept: results readable, late copies recognised.

        None (for ever) where neither ``result_expires`` nor ``pgbarrier_dedup_expires`` is set.
        """
        expires = self.expires.total_seconds() if self.expires else 0.0
        return max(expires, self._settings.dedup_expires or 0.0) or None

    def prepare_expires(self, value: Any, type: Any = None) -> timedelta | None:
        """Return ``result_expires`` as a duration, None for results that do not expire."""
        seconds = super().prepare_expires(value)
        return timedelta(seconds=seconds) if seconds else None

    def as_uri(self, include_password: bool = False) -> str:
        """Return the backend's URL, without the password unless asked for."""
        url = self._database.url
        return "pgbarrier+" + (
            url.render_as_string(hide_password=False) if include_password else safe_url(url)
        )

    def __reduce__(self, args: Any = (), kwargs: Any = None) -> Any:
        return super().__reduce__(args, {**(kwargs or {}), "url": self.url})

    # -- results

    def _meta(self, result: Any, state: str, traceback: Any, request: Any) -> bytes:
        meta = self._get_result_meta(result, state, traceback, request)
        payload = self.encode(meta)
        return payload.encode() if isinstance(payload, str) else bytes(payload)

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **options: Any,
    ) -> Any:
        unit = capture.recording()
        if unit is not None and state in states.READY_STATES:
            meta = self._meta(result, state, traceback, request)
            unit.outcomes[task_id] = Outcome(task_id, state, meta)
            return result
        attempt = capture.attempt_of(request)
        if attempt is not None and attempt.phase == "closed" and attempt.task_id == task_id:
            return result
        if attempt is None and _unclaimed(task_id, request):
            return result
        parameters: dict[str, Any] = {
            "id": task_id,
            "status": state,
            "result": self._meta(result, state, traceback, request),
        }
        fence = capture.fence_for(task_id, request)
        if fence.token is not None:
            statement = sql.STATUS_CLAIMED
            parameters["token"] = fence.token
        else:
            statement = sql.STATUS_PLAIN
            parameters["expires"] = self.keep
        self._database.count(statement, parameters, self._settings.dispatch_timeout)
        return result

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        return self._metas([task_id]).get(task_id) or {
            "status": states.PENDING,
            "result": None,
            "task_id": task_id,
        }

    def _metas(self, task_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        rows = self._database.statement(
            sql.RESULTS, {"ids": list(task_ids)}, self._settings.dispatch_timeout
        )
        return {row.id: self._read_meta(row.id, row.status, row.result) for row in rows}

    def _read_meta(self, task_id: str, status: str, payload: Any) -> dict[str, Any]:
        meta: dict[str, Any] = {"status": status, "result": None}
        if payload is not None:
            meta = self.decode_result(bytes(payload))
        return {**meta, "task_id": task_id}

    def _forget(self, task_id: str) -> None:
        self._database.count(sql.FORGET, {"id": task_id}, self._settings.dispatch_timeout)

    def _save_group(self, group_id: str, result: ResultBase) -> ResultBase:
        payload = self.encode({"result": self.prepare_value(result)})
        parameters = {
            "id": group_id,
            "result": payload.encode() if isinstance(payload, str) else payload,
            "expires": self.keep,
        }
        self._database.count(sql.GROUP_SAVE, parameters, self._settings.dispatch_timeout)
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        rows = self._database.statement(
            sql.GROUP_LOAD, {"id": group_id}, self._settings.dispatch_timeout
        )
        if not rows:
            return None
        value = self.decode(bytes(rows[0].result))["result"]
        if not isinstance(value, ResultBase):
            value = result_from_tuple(value, self.app)
        return {"task_id": group_id, "result": value}

    def _delete_group(self, group_id: str) -> None:
        self._database.count(sql.GROUP_DELETE, {"id": group_id}, self._settings.dispatch_timeout)

    def cleanup(self) -> None:
        """Delete expired rows in batches, each its own transaction (``celery.backend_cleanup``)."""
        reaper.purge(self)

    # -- waiting

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Callable[[dict[str, Any]], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        max_iterations: int | None = None,
        READY_STATES: Any = states.READY_STATES,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield ``(task_id, meta)`` of tasks as they finish, with one query a poll.

        Parameters:
            timeout: seconds to wait for all of them, None for ever.
            interval: the longest pause between polls in seconds; the first ones are shorter.

        Raises:
            celery.exceptions.TimeoutError: not all were ready in time.
        """
        pending = dict.fromkeys(task_ids)
        pause, deadline = _FIRST_POLL, None if timeout is None else time.monotonic() + timeout
        iterations = 0
        while pending:
            for task_id, meta in self._ready(list(pending), READY_STATES):
                del pending[task_id]
                if on_message is not None:
                    on_message(meta)
                yield task_id, meta
            iterations += 1
            if not pending or (max_iterations and iterations >= max_iterations):
                return
            if on_interval is not None:
                on_interval()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise CeleryTimeout(f"The operation timed out: {len(pending)} tasks not ready")
            time.sleep(min(pause, interval, left if left is not None else interval))
            pause = min(pause * 1.5, max(interval, _FIRST_POLL))

    def _ready(self, ids: list[str], ready: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        known = {task_id: self._cache[task_id] for task_id in ids if task_id in self._cache}
        fresh = self._metas([task_id for task_id in ids if task_id not in known])
        for task_id, meta in {**known, **fresh}.items():
            if meta["status"] not in ready:
                continue
            if meta["status"] == states.SUCCESS and task_id not in known:
                self._cache[task_id] = meta
            yield task_id, meta

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
    ) -> dict[str, Any]:
        """Wait for a task and return its meta; parameters and errors as :meth:`get_many`."""
        self._ensure_not_eager()
        found = self.get_many([task_id], timeout, interval, on_interval=on_interval)
        meta = next(meta for _, meta in found)
        if on_interval is not None and meta["status"] in states.PROPAGATE_STATES:
            on_interval()  # the error of a parent that led to this one is raised instead
        return meta

    # -- outcomes: one gate

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
            super(BarrierBackend, self).mark_as_done(task_id, result, request, store_result, state)

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
            super(BarrierBackend, self).mark_as_failure(
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
            super(BarrierBackend, self).mark_as_revoked(
                task_id, reason, request, store_result, state
            )
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
        with capture.into(unit, outcomes=True):
            record()
            if attempt is not None or _recorded(request):
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
        given_up = None
        committed = None
        try:
            committed = barrier.commit(self, unit, self._patience(unit))
        except DatabaseUnavailable as error:
            given_up = error
        if attempt is not None:
            attempt.phase = "closed"
        if committed is not None:
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
            return _PARENT_PATIENCE
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

    # -- attempts

    def claim(self, task: Any, request: Any) -> Attempt:
        """Claim a task that is about to run in this thread.

        Raises:
            celery.exceptions.Ignore: the message is a duplicate or an old copy.
            celery.exceptions.Reject: PostgreSQL was away for ``pgbarrier_outcome_timeout``.
        """
        started = task.track_started and not request.ignore_result
        meta = {"pid": lease.holder().pid, "hostname": request.hostname}
        wanted = Claim(
            task_id=request.id,
            stamp=Stamp.of(request.id, request.get(STAMP)),
            name=task.name,
            status=states.STARTED if started else None,
            result=self._meta(meta, states.STARTED, None, request) if started else None,
            envelope=lambda: self._own_envelope(request),
        )
        try:
            verdict, attempt = lease.claim(self, wanted)
        except DatabaseUnavailable as error:
            raise Reject(error, requeue=True) from error
        if verdict is Verdict.PURGED:
            logger.warning("A late copy of task %s is dropped: %s", request.id, verdict.value)
        if attempt is None:
            raise Ignore(f"not run: {verdict.value}")
        return attempt

    def _own_envelope(self, request: Any) -> Envelope:
        """Make a running task's message again, so that it can be put back."""
        content_type, _ = request.get(CONTENT) or (None, None)
        serializer = compat.serializer_for(content_type) or self.app.conf.task_serializer
        embed = {key: request.get(key) for key in ("callbacks", "errbacks", "chain", "chord")}
        body = (request.args or (), request.kwargs or {}, embed)
        content_type, encoding, payload = dumps(body, serializer)
        delivery = request.delivery_info or {}
        routing_key = delivery.get("routing_key") or ""
        exchange = delivery.get("exchange") or ""
        properties = {
            "correlation_id": request.correlation_id,
            "reply_to": request.reply_to,
            "priority": delivery.get("priority"),
            "delivery_mode": 2,
        }
        return Envelope(
            body=payload.encode(encoding) if isinstance(payload, str) else payload,
            content_type=content_type,
            content_encoding=encoding,
            exchange=exchange,
            routing_key=routing_key,
            headers=compat.message_headers(request),
            declare=[] if exchange else [routing_key],
            properties={key: value for key, value in properties.items() if value is not None},
        )

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

    def process_lost(self, task_id: str, stamp: Stamp, pid: int | None, name: str) -> Loss:
        """Settle a task whose pool process died; called in the worker's parent.

        Raises:
            DatabaseUnavailable: PostgreSQL is away; the audit settles it later.
        """
        held = lease.inspect(self, task_id, _PARENT_PATIENCE)
        if held is None:
            return Loss.UNKNOWN
        if held.state == "done":
            return Loss.FINISHED
        if held.state == "expected" and held.call == stamp.call and held.seq > stamp.seq:
            return Loss.ELSEWHERE  # it had replaced itself: the replacement carries it on
        if held.state in ("expected", "untracked"):
            return Loss.UNKNOWN
        if not held.is_of(stamp, lease.boot.current(), pid):
            return Loss.ELSEWHERE
        loss = lease.put_back(self, held, lease.boot.state == "running", _PARENT_PATIENCE)
        if loss is Loss.SPENT:
            self.fail_recorded(task_id, held.token, reaper.crashed(self, name))
        return loss

    def fail_recorded(self, task_id: str, token: str | None, error: Exception) -> bool:
        """Fail a task on the reaper's word, from its recorded message."""
        request = self._recorded_request(task_id) or Context({"id": task_id})
        row = lease.inspect(self, task_id, _PARENT_PATIENCE)
        if token is not None and row is not None and row.call is not None:
            stamp = Stamp(row.call, row.seq, True)
            attempt = Attempt(task_id, stamp, token, 0, row.barrier_id, Unit(stamp.call))
            attempt.phase = "ended"
            setattr(request, capture.ATTEMPT, attempt)
        self.mark_as_failure(task_id, error, request=request)
        return True

    def _recorded_request(self, task_id: str) -> Context | None:
        """Return the request that a worker would make of a task's recorded message."""
        row = lease.inspect(self, task_id, _PARENT_PATIENCE)
        if row is None or row.message is None:
            return None
        return Context(Envelope.decode(row.message).request())

    # -- chords

    def ensure_chords_allowed(self) -> None:
        """Chords are what this backend is for."""

    def apply_chord(self, header_result_args: Any, body: Any, **options: Any) -> None:
        """Open a barrier, with the unit of the chord that is being published."""
        group_id, results = header_result_args
        unit = capture.unit_for()
        if unit is None:
            unit = capture.new_unit()
            capture.record_with_header(group_id, unit, self._open_chords)
        content_type, encoding, payload = dumps(body, self.app.conf.task_serializer)
        payload = payload.encode(encoding) if isinstance(payload, str) else payload
        opened = Barrier(group_id, f"{content_type}\n{encoding}\n".encode() + payload, body)
        if not compat.is_lazy(results):
            header = self.app.GroupResult(group_id, results)
            opened.members = list(_flat(header))
            if any(isinstance(result, GroupResult) for result in results):
                structure = self.encode({"result": header.as_tuple()})
                opened.structure = (
                    structure.encode() if isinstance(structure, str) else bytes(structure)
                )
        unit.events.append(opened)

    def _open_chords(self, unit: Unit) -> None:
        task = compat.current_task()
        if task is not None and plain.has_row(task):
            bodies = [all_ids(opened.body_signature) for opened in unit.barriers]
            if task.request.id in itertools.chain.from_iterable(bodies):
                plain.replaced(task)
        barrier.open_chords(self, unit)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Add a member to an open chord: with the outcome of the member that adds it.

        Raises:
            DispatchConflict: the chord is complete, or the caller is not one of its members.
        """
        attempt = capture.current_attempt()
        if attempt is not None and attempt.phase == "body":
            attempt.unit.additions.append(Addition(chord_id, result.id, attempt.task_id))
            attempt.added.add(result.id)
            return
        adder = compat.current_task_id()
        parameters = {"id": result.id, "barrier": chord_id, "adder": adder}
        patience = self._settings.dispatch_timeout
        if self._database.count(sql.MEMBER_ADD, parameters, patience):
            return
        added = lease.inspect(self, result.id, patience)  # the answer to an earlier try was lost?
        if added is None or added.barrier_id != chord_id:
            raise DispatchConflict(f"chord {chord_id} is complete or {adder} is no member of it")

    def closing_unit(
        self, closing: Closing, refused: DispatchConflict | None = None
    ) -> tuple[str, Unit]:
        """Return what a complete chord leads to: its body's messages, or its failure.

        Parameters:
            refused: why the body's messages could not be recorded, where that was tried.
        """
        body = self._body_of(closing)
        try:
            if refused is not None:
                raise ChordError(f"Callback error: {refused!r}")
            results = self._join(closing)
            unit = Unit(closing.call)
            with capture.into(unit, outcomes=True):
                try:
                    body.delay(results)
                except Exception as error:
                    logger.exception("Chord callback for %r raised: %r", closing.id, error)
                    raise ChordError(f"Callback error: {error!r}") from error
            return "released", unit
        except ChordError as error:
            logger.error("Chord %r raised: %r", closing.id, error)
            return "failed", self._chord_failure(closing, body, error)

    def _body_of(self, closing: Closing) -> Any:
        content_type, encoding, payload = closing.body.split(b"\n", 2)
        kind = content_type.decode()
        body = loads(payload, kind, encoding.decode(), accept=[kind])
        return maybe_signature(body, app=self.app)

    def _join(self, closing: Closing) -> list[Any]:
        """Return the members' results in header order, nested as the header was.

        Raises:
            ChordError: a member failed; the first in header order is named and is the cause.
        """
        values: dict[str, Any] = {}
        for task_id, payload in closing.members:
            if payload is None:
                raise ChordError(f"Dependency {task_id} ended without a result")
            try:
                meta = self.decode_result(payload)
            except Exception as error:
                raise ChordError(f"Join error: {error!r}") from error
            if meta["status"] in states.PROPAGATE_STATES:
                cause = meta["result"]
                raise ChordError(f"Dependency {task_id} raised {cause!r}") from (
                    cause if isinstance(cause, Exception) else None
                )
            values[task_id] = meta["result"]
        if closing.structure is None:
            return list(values.values())
        header = self.decode(closing.structure)["result"]
        if not isinstance(header, ResultBase):
            header = result_from_tuple(header, self.app)
        return _nested(header, values) + list(values.values())

    def _chord_failure(self, closing: Closing, body: Any, error: ChordError) -> Unit:
        unit = Unit(closing.call)
        ids = list(all_ids(body))
        with capture.into(unit, outcomes=True), allow_join_result():
            try:
                raise error
            except ChordError:
                self.chord_error_from_stack(body, error)
            for task_id in dict.fromkeys([*ids, *leaves(body)]):
                self._hidden(unit, task_id, error, states.FAILURE, None, visible=True)
        return unit


def _recorder(app: Celery) -> Callable[[Unit], None] | None:
    """Return what records a chord of this app, None where its backend is another one."""
    backend = app.backend
    if not isinstance(backend, BarrierBackend):
        return None
    return backend._open_chords


def _database(app: Celery, url: str, settings: Settings) -> Database:
    """Return the process's one database for a URL; backends are made per thread."""
    options = _engine_options(app)
    key = (url, settings.schema, settings.auto_migrate, repr(sorted(options.items())))
    if key not in _databases:
        _databases[key] = Database(parse_url(url), settings.schema, settings.auto_migrate, options)
    return _databases[key]


def _engine_options(app: Celery) -> dict[str, Any]:
    """Return ``database_engine_options`` where the user set them; Celery's defaults ping."""
    if app.conf.value_set_for("database_engine_options"):
        return dict(app.conf.database_engine_options or {})
    return {}


def _unclaimed(task_id: str, request: Any) -> bool:
    """Tell whether a state comes from a claiming task that holds no claim (yet)."""
    task = compat.current_task()
    running = getattr(task, "pgbarrier_claims", False) and not task.request.called_directly
    return bool(running and request is not None and not request.is_eager
                and request.id == task_id and request is task.request)  # fmt: skip


def _recorded(request: Any) -> bool:
    """Tell whether a plain task's message was recorded, so that its row waits for an outcome."""
    stamp = getattr(request, STAMP, None)
    return bool(stamp and stamp.get("rec") and stamp.get("id") == getattr(request, "id", None))


def _call_of(request: Any) -> str | None:
    stamp = getattr(request, STAMP, None)
    return str(stamp["call"]) if stamp else None


def _with_errbacks(request: Any, errbacks: list[Any]) -> Context:
    return Context({**vars(request), "errbacks": errbacks})


def _flat(result: Any) -> Iterator[str]:
    for child in result.results:
        if isinstance(child, GroupResult):
            yield from _flat(child)
        else:
            yield child.id


def _nested(result: Any, values: dict[str, Any]) -> list[Any]:
    """Return values in the shape of a group result; they are taken out of *values*."""
    return [
        _nested(child, values) if isinstance(child, GroupResult) else values.pop(child.id)
        for child in result.results
    ]


capture.wrap_chords(_recorder)
