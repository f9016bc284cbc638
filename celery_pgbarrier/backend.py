"""``BarrierBackend``: Celery's result backend calls, translated to results and barriers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from celery import Celery, states
from celery.canvas import maybe_signature
from celery.exceptions import ChordError
from celery.result import GroupResult, allow_join_result
from celery.utils.log import get_logger
from kombu.serialization import dumps, loads
from kombu.utils.encoding import ensure_bytes

from celery_pgbarrier import barrier, beat, capture, compat, lease, plain, reference, worker
from celery_pgbarrier.attempts import Attempts
from celery_pgbarrier.barrier import Closing
from celery_pgbarrier.errors import DispatchConflict
from celery_pgbarrier.reference import Page, Reference
from celery_pgbarrier.store import sql
from celery_pgbarrier.unit import Addition, Barrier, Unit, all_ids, leaves

__all__ = ["BarrierBackend"]

logger = get_logger(__name__)


class BarrierBackend(Attempts):
    """Keeps results, groups and chords in PostgreSQL.

    URL: ``pgbarrier://user:password@host:port/database`` (psycopg2) or
    ``pgbarrier+postgresql+psycopg://...`` (psycopg 3).

    Raises:
        ConfigurationError: a URL, a driver or a ``pgbarrier_*`` setting that cannot be used.
    """

    def __init__(self, app: Celery, url: str | None = None, **options: Any) -> None:
        super().__init__(app=app, url=url, **options)
        capture.install(app)
        worker.install(app)
        beat.register(app)

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
        kind = f"{content_type}\n{encoding}\n"
        opened = Barrier(group_id, ensure_bytes(kind) + ensure_bytes(payload), body)
        if not compat.is_lazy(results):
            header = self.app.GroupResult(group_id, results)
            opened.members = list(_flat(header))
            if any(isinstance(result, GroupResult) for result in results):
                opened.structure = ensure_bytes(self.encode({"result": header.as_tuple()}))
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
            results = self._results(closing, body)
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

    def _results(self, closing: Closing, body: Any) -> Any:
        """Return what a body gets: its members' results, by reference where they are large.

        Raises:
            ChordError: a member failed; the first in header order is named and is the cause.
        """
        if closing.count < closing.size:
            gone = closing.size - closing.count
            raise ChordError(f"the rows of {gone} of {closing.size} members are gone")
        large = closing.bytes > self._settings.inline_results
        if not large or not reference.readable(self.app, body):
            return self._join(closing)
        for page in closing.doubtful():
            self._succeeded(page)
        return Reference(closing.id, closing.call, closing.size, closing.count).argument()

    def _join(self, closing: Closing) -> list[Any]:
        """Return the members' results in header order, nested as the header was."""
        values: dict[str, Any] = {}
        for page in closing.members():
            values.update(self._succeeded(page))
        structure = closing.structure
        return reference.shaped(values, None if structure is None else self.read_group(structure))

    def _succeeded(self, page: Page) -> dict[str, Any]:
        """Return the results of a page of members by id; ChordError where one has failed."""
        ids = [task_id for task_id, _ in page]
        payloads = [payload for _, payload in page]
        try:
            metas = self.metas([payload for payload in payloads if payload is not None])
        except Exception as error:
            raise ChordError(f"Join error: {error!r}") from error
        found = iter(metas)
        values: dict[str, Any] = {}
        for task_id, payload in zip(ids, payloads, strict=True):
            if payload is None:
                raise ChordError(f"Dependency {task_id} ended without a result")
            meta = next(found)
            if meta["status"] in states.PROPAGATE_STATES:
                cause = meta["result"]
                raise ChordError(f"Dependency {task_id} raised {cause!r}") from (
                    cause if isinstance(cause, Exception) else None
                )
            values[task_id] = meta["result"]
        return values

    def _chord_failure(self, closing: Closing, body: Any, error: ChordError) -> Unit:
        unit = Unit(closing.call)
        steps = [body, *(body.options.get("chain") or ())]  # the body's task may begin a chain
        ids = [task_id for step in steps for task_id in (*all_ids(step), *leaves(step))]
        capture.hold_revokes(self.app)
        with capture.into(unit, outcomes=True), allow_join_result():
            try:
                raise error
            except ChordError:
                self.chord_error_from_stack(body, error)
            for task_id in dict.fromkeys(ids):
                self._hidden(unit, task_id, error, states.FAILURE, None, visible=True)
        return unit


def _recorder(app: Celery) -> Callable[[Unit], None] | None:
    """Return what records a chord of this app, None where its backend is another one."""
    backend = app.backend
    if not isinstance(backend, BarrierBackend):
        return None
    return backend._open_chords


def _flat(result: Any) -> Iterator[str]:
    for child in result.results:
        if isinstance(child, GroupResult):
            yield from _flat(child)
        else:
            yield child.id


capture.wrap_chords(_recorder)
