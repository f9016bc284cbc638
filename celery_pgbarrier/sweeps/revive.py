"""Find jobs that are stuck in the user's own table, and send a task for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from celery import Celery

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps import hosts, outbox
from celery_pgbarrier.sweeps.base import Run, Sweep
from celery_pgbarrier.sweeps.batches import Pick, Update, isolate
from celery_pgbarrier.sweeps.engine import Batch
from celery_pgbarrier.sweeps.hosts import EngineSource
from celery_pgbarrier.sweeps.outbox import Letter
from celery_pgbarrier.sweeps.steps import statement_batch
from celery_pgbarrier.sweeps.tables import Column, Condition, Key, Table
from celery_pgbarrier.sweeps.values import Assignments, Values
from celery_pgbarrier.unit import Host

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from celery_pgbarrier.sweeps.options import OptionValues


@dataclass(frozen=True)
class Rule:
    """One way in which a row is stuck, and what is done about it.

    Parameters:
        name: shown in the counts.
        where: which rows are stuck: an SQLAlchemy expression, or a function of the database's
            ``now``.
        values: what the row is stamped with, in the transaction that records the message; after
            it the row must be stuck no longer, until the rule's threshold has passed again.
            At least one value that is no SQL expression (``func.now()`` counts as plain).
        task: the name of the task to send; without one (and without *send*) the row is only
            stamped, such as a job whose attempts are spent.
        args, kwargs: functions of the row that return the task's arguments.
        options: what :meth:`celery.Celery.send_task` takes besides (queue, countdown...), or a
            function of the row that returns it.
        send: in place of *task*, a function of the row that sends what it likes, such as a chain.
        order_by: which rows come first.
    """

    name: str
    where: Condition
    values: Values
    task: str | None = None
    args: Callable[[Any], Sequence[Any]] = field(default=lambda row: ())
    kwargs: Callable[[Any], Mapping[str, Any]] = field(default=lambda row: {})
    options: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = field(default_factory=dict)
    send: Callable[[Any], Any] | None = None
    order_by: Sequence[Any] = ()

    @property
    def sends(self) -> bool:
        """Whether anything is sent."""
        return self.task is not None or self.send is not None

    def sender(self, app: Celery) -> Callable[[Any], Any]:
        """Return what sends the messages of a row."""
        return self.send if self.send is not None else partial(self._send_task, app)

    def _send_task(self, app: Celery, row: Any) -> None:
        options = self.options(row) if callable(self.options) else self.options
        app.send_task(
            self.task, args=tuple(self.args(row)), kwargs=dict(self.kwargs(row)), **options
        )


class Revive(Sweep):
    """Finds stuck rows by rules, stamps them, and sends a task for each, in one transaction.

    The messages go through the outbox of the ``pgbarrier`` result backend: they are recorded in
    the transaction that stamps the rows and published after it, so that neither is there without
    the other.  The table must live in the database of the result backend.

    Parameters:
        rules: see :class:`Rule`; a run takes them in this order, and ``max_batches`` counts for
            each.
        load: ORM loader options for the rows that the rules' functions get.

    More parameters, methods and errors: :class:`~celery_pgbarrier.sweeps.Sweep`.
    """

    default_batch_size = 100

    def __init__(
        self,
        name: str,
        table: Table,
        *,
        rules: Sequence[Rule],
        load: Sequence[Any] = (),
        key: Sequence[Column] = (),
        order_by: Any = (),
        engine: EngineSource = None,
        **options: Unpack[OptionValues],
    ) -> None:
        super().__init__(name, table, key=key, order_by=order_by, engine=engine, **options)
        self._load = tuple(load)
        self._rules = {rule.name: rule for rule in rules}
        if len(self._rules) != len(rules) or not rules:
            raise ConfigurationError(f"sweep {name} needs rules, each with a name of its own")
        self._stamps = {
            rule.name: Assignments(self.target, rule.values, f"values of rule {rule.name}")
            for rule in rules
        }

    def picks(self, now: datetime) -> dict[str, Pick]:
        """Return the stuck rows by rule."""
        return {name: self._pick(rule, now) for name, rule in self._rules.items()}

    def _pick(self, rule: Rule, now: datetime) -> Pick:
        stuck = sa.and_(
            self.target.condition(rule.where, now), self._stamps[rule.name].outstanding(now)
        )
        return Pick(self.target, stuck, (*rule.order_by, *self._order))

    # -- a run

    def _work(self, run: Run) -> None:
        host = None
        if any(rule.sends for rule in self._rules.values()):
            host = hosts.publisher(f"sweep {self.name}", run.app)
            with run.turn.reading() as connection:
                hosts.same_database(connection, host, f"sweep {self.name}")
        stopped = None
        for name, rule in self._rules.items():
            before = run.counts.rows
            run.repeat(self._step(run, rule, host))
            run.counts.rules[name] = run.counts.rows - before
            stopped = stopped or run.counts.stopped
        run.counts.stopped = stopped

    def _step(self, run: Run, rule: Rule, host: Host | None) -> Callable[[int], Batch]:
        pick, stamp = self._pick(rule, run.now), Update(self._stamps[rule.name].at(run.now))
        if host is None or not rule.sends:
            return partial(statement_batch, run, pick, stamp)
        return partial(self._sending_batch, run, host, rule, pick, stamp)

    def _sending_batch(
        self, run: Run, host: Host, rule: Rule, pick: Pick, stamp: Update, size: int
    ) -> Batch:
        target = self.target
        with run.batch() as connection:
            rows = target.rows(
                connection, lambda select: pick.narrow(select, size, run.failed), self._load
            )
            letters, errors = _letters(rows, rule.sender(host.app))

            def act(chosen: Sequence[Letter]) -> None:
                keys = [letter.key for letter in chosen]
                connection.execute(stamp.statement(target, target.matches(keys)))
                outbox.write(connection, host, chosen)

            sent, refused = isolate(connection, letters, act)
        for key, error in [*errors, *((letter.key, error) for letter, error in refused)]:
            run.fail(key, error)
        outbox.publish(host, sent)
        return Batch(len(sent), more=len(rows) >= size)


def _letters(
    rows: Sequence[tuple[Key, Any]], send: Callable[[Any], Any]
) -> tuple[list[Letter], list[tuple[Key, Exception]]]:
    letters: list[Letter] = []
    errors: list[tuple[Key, Exception]] = []
    for key, row in rows:
        try:
            letters.append(outbox.caught(key, row, send))
        except Exception as error:
            errors.append((key, error))
    return letters, errors
