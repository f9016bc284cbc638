"""``BarrierTask``: a run is claim, body, outcome."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

from celery.app.task import Task
from celery.canvas import group
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.log import get_logger

from celery_pgbarrier import capture, effects, faults
from celery_pgbarrier.effects import Place, Transaction
from celery_pgbarrier.errors import ClaimLost, ConfigurationError, MemberEndedWithoutResult
from celery_pgbarrier.lease import Attempt
from celery_pgbarrier.reference import Reference
from celery_pgbarrier.unit import HandOver, Unit, ends_in_group

__all__ = ["BarrierTask"]

logger = get_logger(__name__)


class BarrierTask(Task):  # type: ignore[misc]
    """Task base class whose runs are claimed in PostgreSQL.

    Use it for a whole app with ``Celery(task_cls="celery_pgbarrier:BarrierTask")`` or for one
    task with ``@app.task(base=BarrierTask)``.  A call of it

    - runs under one valid claim at a time; a duplicate delivery is acknowledged and dropped;
    - runs again when its process dies, ``pgbarrier_max_crashes`` times at most;
    - commits its outcome together with what follows from it (links, next chain step, retry,
      replacement, errbacks), and is refused all of it when its claim has passed on.

    A chord member that raises :exc:`~celery.exceptions.Ignore` fails its chord with
    :exc:`~celery_pgbarrier.errors.MemberEndedWithoutResult`.  ``Reject(requeue=True)`` puts the
    task back, ``Reject(requeue=False)`` is its failure.

    Requires the ``pgbarrier`` result backend; a worker with another one fails the task with
    :exc:`~celery_pgbarrier.errors.ConfigurationError`.
    """

    abstract = True
    Request = "celery_pgbarrier.request:BarrierRequest"
    #: Tells the backend that states of this task are written under a claim.
    pgbarrier_claims = True
    #: Whether a body whose results come by reference (``pgbarrier_inline_results``) gets them as a
    #: sequence that reads pages of them as they are asked for, and not as a list.
    pgbarrier_lazy_results = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Make a subclass's own ``before_start`` and ``__call__`` run under the claim."""
        super().__init_subclass__(**options)
        for name, wrap in (("before_start", _claimed_first), ("__call__", _as_attempt)):
            method = getattr(cls, name)  # its own, or that of a mixin beside BarrierTask
            if method is not getattr(BarrierTask, name) and not hasattr(method, "_pgbarrier"):
                wrapped = wrap(method)
                wrapped._pgbarrier = True  # type: ignore[attr-defined]
                setattr(cls, name, wrapped)

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Claim the task; Celery calls this before its body."""
        self._claim()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body: claimed in a worker, plainly where the task is called as a function."""
        if self._in_worker():
            return self._attempt(self.run, args, kwargs)
        return super().__call__(*args, **kwargs)

    def replace(self, sig: Any) -> Any:
        """Run another signature in this task's place, under its id.

        A canvas that ends in a group comes to the list of the group's results.  Celery sees to that
        for a group, but not for a chord whose body is one: nothing would ever have the task's id.
        """
        if self._in_worker() and not isinstance(sig, group) and ends_in_group(sig):
            sig |= self.app.tasks["celery.accumulate"].s(index=0)
        return super().replace(sig)

    def on_replace(self, sig: Any) -> Any:
        """Send the replacement with the hand-over of this task's id."""
        attempt = capture.attempt_of(self.request)
        if attempt is None:
            return super().on_replace(sig)
        attempt.replaced = True
        with capture.into(attempt.unit):
            return super().on_replace(sig)

    def add_to_chord(self, sig: Any, lazy: bool = False) -> Any:
        """Add a member to this task's chord; it is recorded with this task's success."""
        attempt = capture.attempt_of(self.request)
        if attempt is None:
            return super().add_to_chord(sig, lazy)
        with capture.into(attempt.unit):
            return super().add_to_chord(sig, lazy)

    # -- effects

    def transaction(
        self, step: str, on: Place | Any = None, using: str | None = None
    ) -> AbstractContextManager[Transaction]:
        """Commit what a block writes to the result backend's database exactly once.

        ::

            with self.transaction("charge") as tx:
                if not tx.done:
                    tx.session.execute(insert(Charge).values(order=order))
                    receipt.delay(order)  # is sent when the block is committed
                    tx.set(amount)
            amount = tx.value

        A marker of (task, call, step) is committed with the block. A run that finds it, after a
        crash or a retry, is given ``tx.done`` and the stored ``tx.value``, and leaves the block at
        the latest at its first use of the database or its first message.  A run whose claim has
        passed on is rolled back and ends.  An error in the block rolls it back and is raised.
        Outside a worker (called as a function, or eagerly) it is a plain transaction.

        Parameters:
            step: the name of the step, one for each use in a run.
            on: the user's own SQLAlchemy session, connection, engine or sessionmaker on the same
                database, not in a transaction; by default a new session.
            using: a Django database alias of the same database, in place of *on*.

        Raises:
            ClaimLost: the task has passed to another run; let it pass.
            TransactionError: nested, a step used twice, a commit inside; the message says what.
            ConfigurationError: the connection leads to another database.
            DatabaseUnavailable: PostgreSQL is away; the block was not entered.
        """
        return effects.transaction(self, step, on, using)

    def once(
        self,
        step: str,
        function: Callable[..., Any],
        *args: Any,
        on: Place | Any = None,
        using: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call ``function(tx, *args, **kwargs)`` in :meth:`transaction`; return its stored value.

        Where the step is done, the function is not called.  After a deadlock, a serialization
        failure or a lost connection the step is tried again for ``pgbarrier_dispatch_timeout``
        seconds.

        Parameters and errors as :meth:`transaction`.
        """

        def call(tx: Transaction) -> Any:
            return function(tx, *args, **kwargs)

        return effects.once(self, step, call, on, using)

    # -- the protocol

    def _in_worker(self) -> bool:
        request = self.request
        return not (request.called_directly or request.is_eager)

    def _claim(self) -> None:
        request = self.request
        if not self._in_worker() or capture.attempt_of(request) is not None:
            return
        claim = getattr(self.backend, "claim", None)
        if claim is None:
            raise ConfigurationError(
                f"{self.name} is a BarrierTask, which needs the pgbarrier result backend: set "
                "result_backend to pgbarrier://user:password@host:port/database"
            )
        setattr(request, capture.ATTEMPT, claim(self, request))

    def _read(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments with a chord's results in place of a reference to them."""
        found = Reference.of(args[0]) if args else None
        if found is None:
            return args
        return (self.backend.read_results(found, self.pgbarrier_lazy_results), *args[1:])

    def _attempt(
        self, body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._claim()
        attempt = capture.attempt_of(self.request)
        if attempt is None or attempt.entered:
            return body(*args, **kwargs)
        attempt.entered = True
        try:
            result = body(*self._read(args), **kwargs)
        except Retry as retry:
            self._retried(attempt, retry)
            raise
        except ClaimLost as lost:
            attempt.phase = "closed"
            logger.warning("%s", lost)
            raise Ignore(str(lost)) from lost
        except Ignore as ignore:
            self._ignored(attempt, ignore)
            raise
        except Reject as reject:
            self._rejected(attempt, reject)
            raise
        except Exception:
            self._ended(attempt, Unit(attempt.stamp.call))
            raise
        if attempt.own_message() is not None:  # retry(throw=False): the retry stands
            thrown = Retry("retried by retry(throw=False)")
            self._retried(attempt, thrown)
            raise thrown
        faults.point("body.returned")
        self._ended(attempt, attempt.unit)
        return result

    def _ended(self, attempt: Attempt, unit: Unit) -> None:
        """From here on, what is published belongs to the outcome."""
        attempt.unit, attempt.phase = unit, "ended"

    def _retried(self, attempt: Attempt, retry: Retry) -> None:
        message = attempt.own_message()
        if message is None:  # Retry was raised without self.retry(): nothing carries the task on
            self._ignored(attempt, retry)
            return
        unit = Unit(attempt.stamp.call)
        unit.events.append(message)
        status, result = self.backend.retry_meta(self, self.request, retry)
        unit.primary = HandOver(
            attempt.task_id, attempt.fence(), attempt.next_stamp(), status, result
        )
        self.backend.hand_over(attempt, unit)

    def _ignored(self, attempt: Attempt, reason: Exception) -> None:
        if attempt.replaced:
            unit = attempt.unit
            unit.primary = HandOver(attempt.task_id, attempt.fence(), attempt.next_stamp())
            self.backend.hand_over(attempt, unit)
        elif attempt.barrier_id is not None:
            error = MemberEndedWithoutResult(
                f"{self.name}[{attempt.task_id}] ended with {type(reason).__name__} and no result: "
                "a chord needs a result or an error of each member"
            )
            self._ended(attempt, Unit(attempt.stamp.call))
            self.backend.mark_as_failure(attempt.task_id, error, request=self.request)
        else:
            self.backend.abandon(attempt)

    def _rejected(self, attempt: Attempt, reject: Reject) -> None:
        if reject.requeue:
            self.backend.give_back(attempt)
        else:
            self._ended(attempt, Unit(attempt.stamp.call))
            self.backend.mark_as_failure(attempt.task_id, reject, request=self.request)


def _claimed_first(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def before_start(self: BarrierTask, *args: Any, **kwargs: Any) -> Any:
        self._claim()
        return method(self, *args, **kwargs)

    return before_start


def _as_attempt(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def __call__(self: BarrierTask, *args: Any, **kwargs: Any) -> Any:
        if self._in_worker():
            return self._attempt(partial(method, self), args, kwargs)
        return method(self, *args, **kwargs)

    return __call__
