"""``with self.transaction(step) as tx``: from the marker's look-up to the messages' publication."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from celery_pgbarrier import barrier, capture, faults, outbox, writing
from celery_pgbarrier.effects import trouble
from celery_pgbarrier.effects.marker import Found, Marker
from celery_pgbarrier.effects.target import Place, Skipped, Target, target_for
from celery_pgbarrier.errors import TransactionError
from celery_pgbarrier.unit import Unit

#: The requests whose blocks are open in this context, the innermost last.
_open: ContextVar[tuple[Any, ...]] = ContextVar("pgbarrier_transactions", default=())


class Transaction:
    """What ``with self.transaction(step) as tx`` gives.

    ``tx.done`` tells whether an earlier run has committed the step.  If it has, the block is to do
    nothing: the first use of ``tx.session`` or ``tx.connection`` (or of the session or connection
    that ``self.transaction`` was given) leaves the block, without an error.  After the block,
    ``tx.value`` is what was stored with the step, by whichever run committed it.
    """

    def __init__(self, step: str, target: Target, backend: Any) -> None:
        self.step = step
        self.done = False
        self._target = target
        self._backend = backend
        self._value: bytes | None = None

    @property
    def session(self) -> Session:
        """The SQLAlchemy session to write through."""
        self._leave_if_done()
        return self._target.session

    @property
    def connection(self) -> Any:
        """The connection to write through: SQLAlchemy's, or Django's where that is used."""
        self._leave_if_done()
        return self._target.connection

    def _leave_if_done(self) -> None:
        if self.done:
            raise Skipped

    def set(self, value: Any) -> None:
        """Store a value with the step, encoded with ``result_serializer``.

        Raises:
            kombu.exceptions.EncodeError: the serializer refuses the value.
        """
        self._leave_if_done()
        encoded = self._backend.encode(value)
        self._value = encoded.encode() if isinstance(encoded, str) else encoded

    @property
    def value(self) -> Any:
        """The value stored with the step, as it was decoded; None where none was set."""
        return None if self._value is None else self._backend.decode(self._value)

    def _adopt(self, found: Found) -> None:
        self.done, self._value = True, found.value


@contextmanager
def transaction(
    task: Any, step: str, on: Place | Any = None, using: str | None = None
) -> Iterator[Transaction]:
    """Do what ``BarrierTask.transaction`` says, for a running task."""
    request, backend = task.request, task.backend
    host = backend if hasattr(backend, "claim") else None
    attempt = capture.attempt_of(request)
    _refuse_misuse(request, attempt, step)
    target = target_for(on, using, host.database if host else None)
    tx = Transaction(step, target, backend)
    marker = None
    if host is not None and attempt is not None:
        replaced = int(request.get("replaced_task_nesting") or 0)
        marker = Marker(host, attempt, task.name, step, replaced)
    run = _Run(tx, target, host, marker, Unit(attempt.stamp.call if attempt else None))
    token = _open.set((*_open.get(), request))
    try:
        run.begin()
        with run.block():
            yield tx
        run.end()
    finally:
        _open.reset(token)
        target.close()
    if attempt is not None:
        attempt.steps.add(step)
    run.publish()


def _refuse_misuse(request: Any, attempt: Any, step: str) -> None:
    if not isinstance(step, str) or not step:
        raise TransactionError('self.transaction() takes the name of a step: "charge"')
    if any(request is other for other in _open.get()):
        raise TransactionError(
            f"self.transaction({step!r}) is opened inside another one: each commits by itself; "
            "end the outer block first, or do both in one step (session.begin_nested() "
            "gives a savepoint)"
        )
    if attempt is not None and step in attempt.steps:
        raise TransactionError(
            f"step {step!r} has been committed by this run of the task already: give each use of "
            'self.transaction() a name of its own, as f"charge-{order}"'
        )
    if attempt is not None and attempt.phase != "body":
        raise TransactionError("self.transaction() belongs into the body of a task")


class _NoMessages(list[Any]):
    """Leaves the block of a step that is done at the first message that it sends."""

    def append(self, message: Any) -> None:
        """Leave the block."""
        raise Skipped


class _Run:
    """One pass through a block."""

    def __init__(
        self, tx: Transaction, target: Target, host: Any, marker: Marker | None, unit: Unit
    ) -> None:
        self._tx, self._target, self._host = tx, target, host
        self._marker, self._unit = marker, unit
        self._ready: list[str] = []
        self._late: Exception | None = None

    def begin(self) -> None:
        """Begin the transaction, and see whether the step is done."""
        if self._host is None:
            self._target.begin()
            return
        found = self._host.database.patiently(self._begin, self._host.settings.dispatch_timeout)
        if found is not None and found.done:
            self._target.rollback()
            self._tx._adopt(found)

    def _begin(self) -> Found | None:
        self._target.begin()
        try:
            return self._marker.find(self._target) if self._marker else None
        except BaseException:
            self._target.rollback()
            raise

    @contextmanager
    def block(self) -> Iterator[None]:
        """Run the user's code; an error rolls back, and is raised."""
        if self._tx.done:
            with self._skipped(), self._target.skipping():
                yield
            return
        try:
            if self._host is None:
                yield
            else:
                with capture.into(self._unit, body=True):
                    yield
        except BaseException:
            self._target.rollback()
            raise

    @contextmanager
    def _skipped(self) -> Iterator[None]:
        try:
            unit = Unit()
            unit.events = _NoMessages()
            with capture.into(unit, body=True):
                yield
        except Skipped:
            pass

    def end(self) -> None:
        """Commit the block with its messages and its marker."""
        if self._tx.done:
            return
        try:
            recorded = self._write()
        except BaseException:
            self._target.rollback()
            raise
        if not recorded:  # another thread of this attempt was faster
            self._target.rollback()
            assert self._marker is not None
            self._drop(self._marker.settle())
            return
        faults.point("effect.committing")
        try:
            self._target.commit()
        except Exception as error:
            self._settle(error)

    def _write(self) -> bool:
        self._target.flush()
        if self._unit.events:
            # The target executes as a connection does, which is all that writing a unit needs.
            connection = cast(Connection, self._target)
            self._ready = writing.write(connection, self._host, self._unit).ready
        return self._marker is None or self._marker.record(self._target, self._tx._value)

    def _settle(self, error: Exception) -> None:
        """Tell a COMMIT that failed from one whose answer was lost."""
        self._target.rollback()
        if self._marker is None:
            raise error
        found = self._marker.settle()
        if not found.done:
            raise error if found.claimed or found.absent else self._marker.lost() from error
        if found.token != self._marker.token:
            raise self._marker.lost() from error
        if not trouble.answer_lost(error):
            self._late = error  # of what Django was to run on commit

    def _drop(self, found: Found) -> None:
        self._tx._adopt(found)
        self._unit, self._ready = Unit(), []

    def publish(self) -> None:
        """Publish what was sent inside the block, now that it is committed."""
        if self._tx.done or self._host is None:
            return
        faults.point("effect.committed")
        outbox.publish(self._host, self._unit)
        for barrier_id in self._ready:
            barrier.release(self._host, barrier_id)
        if self._late is not None:
            raise self._late
