"""What all sweeps have in common: a name, a table, options, a task, a beat entry, a run."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.app.task import Task
from sqlalchemy import ColumnElement, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.store.sweeps import Waits
from celery_pgbarrier.sweeps import advice, hosts, options, progress, registry, shutdown
from celery_pgbarrier.sweeps.batches import Pick
from celery_pgbarrier.sweeps.counts import Counts, Stop
from celery_pgbarrier.sweeps.engine import Batch, Limits, run_batches
from celery_pgbarrier.sweeps.hosts import EngineSource
from celery_pgbarrier.sweeps.options import Options, OptionValues
from celery_pgbarrier.sweeps.tables import Column, Key, Table, Target
from celery_pgbarrier.sweeps.turn import Turn, TurnTaken

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

TASK_PREFIX = "celery_pgbarrier.sweep."
#: Up to which number what is left is counted: exactly, a count would be an unbounded statement.
_COUNTED = 10_000
#: How often trouble that passes is tried again, with pauses of 0.2 s to 5 s.
_RETRIES = 5
#: As _COUNTED, for a dry run.
_COUNTED_DRY = 1_000_000


class Run:
    """One run of a sweep: its moment, its turn, what failed in it."""

    def __init__(
        self,
        turn: Turn,
        options: Options,
        app: Celery | None,
        stop: Callable[[], bool],
        report: Callable[[Counts], None],
    ) -> None:
        self.turn, self.options, self.app = turn, options, app
        self.stop, self._report = stop, report
        self._begun = time.monotonic()
        self.now = datetime.now(timezone.utc)
        self.counts = Counts()
        self.failed: list[Key] = []

    @contextmanager
    def batch(self) -> Iterator[Connection]:
        """Open the transaction of a batch."""
        with self.turn.batch() as connection:
            yield connection

    def report(self, counts: Counts) -> None:
        """Tell how far the run is."""
        counts.seconds = self.seconds
        self._report(counts)

    @property
    def seconds(self) -> float:
        """How long the run has been going on."""
        return time.monotonic() - self._begun

    def fail(self, key: Key, error: BaseException) -> None:
        """Report a row that could not be handled; it is not tried again in this run."""
        logger.error("Row %s could not be handled and is left: %r", key, error)
        self.failed.append(key)
        self.counts.fail(key, error)

    def repeat(self, step: Callable[[int], Batch]) -> None:
        """Do batches until there is nothing left or an option ends the run."""
        given = self.options
        limits = Limits(
            batch_size=given.batch_size,
            max_batches=given.max_batches,
            max_seconds=given.max_seconds,
            max_failed=given.max_failed,
            pause=given.pause,
            retries=_RETRIES,
        )
        run_batches(step, limits, self.counts, self.stop, self.report, self._begun)


class Sweep(ABC):
    """A job over a table of the user's, in batches that are each a transaction of their own.

    Parameters:
        name: unique in the database; the task is ``celery_pgbarrier.sweep.<name>``.
        table: a mapped class or a :class:`sqlalchemy.Table`.
        key: the columns that identify a row, where the table has no primary key.
        order_by: which rows come first; by key, oldest first, where it is not given.
        engine: an :class:`~sqlalchemy.Engine` or a function that makes one, for the task and the
            command line; that of the ``pgbarrier`` result backend where it is not given.
        options: see :data:`celery_pgbarrier.sweeps.options.OPTIONS`.  ``app.conf.pgbarrier_sweeps``
            and ``PGBARRIER_SWEEP_<NAME>_<OPTION>`` override them.

    Raises:
        ConfigurationError: a table, a column or an option that cannot be used.
    """

    default_batch_size = 1000

    def __init__(
        self,
        name: str,
        table: Table,
        *,
        key: Sequence[Column] = (),
        order_by: Any = (),
        engine: EngineSource = None,
        **values: Unpack[OptionValues],
    ) -> None:
        if not name or not isinstance(name, str):
            raise ConfigurationError(f"a sweep needs a name, got {name!r}")
        self.name = name
        self.target = Target(table, key)
        given = order_by if isinstance(order_by, (tuple, list)) else (order_by,)
        self._order: tuple[ColumnElement[Any], ...] = (*given, *self.target.key)
        self._engines = hosts.Engines(engine)
        self._declared = options.check(values, f"sweep {name}")
        self._app: Celery | None = None

    @property
    def task_name(self) -> str:
        """The name of the task that :meth:`register` makes."""
        return TASK_PREFIX + self.name

    # -- what a kind of sweep defines

    @abstractmethod
    def picks(self, now: datetime) -> dict[str, Pick]:
        """Return which rows match, by rule; one with an empty name for a sweep without rules."""

    @abstractmethod
    def _work(self, run: Run) -> None:
        """Do the run, adding to ``run.counts``."""

    # -- running

    def run(
        self,
        engine: Engine | None = None,
        *,
        app: Celery | None = None,
        now: datetime | None = None,
        stop: Callable[[], bool] = shutdown.stopping,
        report: Callable[[Counts], None] | None = None,
        **overrides: Unpack[OptionValues],
    ) -> Counts:
        """Do one run and return what it did.

        Parameters:
            engine: the database of the table; see the class where it is not given.
            app: the application, where :meth:`register` was not called.
            now: the moment that filters refer to; the database's time when the run begins.
            stop: asked between batches (and rows with a hook); true ends the run.
            report: called with the counts after each batch.
            overrides: options for this run.

        Raises:
            ConfigurationError: an option or a table that cannot be used.
            sqlalchemy.exc.DBAPIError: PostgreSQL refuses or is away; committed batches stand.
        """
        app = app or self._app
        chosen = self.options(app, overrides)
        if not chosen.enabled:
            logger.info("Sweep %s is disabled", self.name)
            return Counts(stopped=Stop.DISABLED)
        run = self._begin(engine, app, chosen, stop, report)
        try:
            moment = run.turn.take()
        except TurnTaken as error:
            logger.info("%s", error)
            return Counts(stopped=error.stop)
        try:
            run.now = _utc(now or moment)
            self._in_turn(run)
        finally:
            _give(run)
        logger.info("Sweep %s: %s", self.name, run.counts)
        return run.counts

    def dry_run(
        self,
        engine: Engine | None = None,
        *,
        app: Celery | None = None,
        now: datetime | None = None,
    ) -> Counts:
        """Change nothing; return as ``left`` how many rows match, up to a million."""
        app = app or self._app
        run = self._begin(engine, app, self.options(app, {}), lambda: False, None)
        run.now = _utc(now or run.turn.look())
        self._count(run, _COUNTED_DRY)
        self._advise(run)
        return run.counts

    def options(self, app: Celery | None, overrides: OptionValues) -> Options:
        """Return the options of a run: declared, configured, from the environment, of the call."""
        layers = [{"batch_size": self.default_batch_size}, self._declared]
        if app is not None:
            names = registry.sweeps(app)
            layers.append(options.from_settings(self.name, app.conf, names))
        layers.append(options.from_environment(self.name))
        layers.append(options.check(overrides, f"sweep {self.name}"))
        return options.resolve(self.name, layers)

    def _begin(
        self,
        engine: Engine | None,
        app: Celery | None,
        chosen: Options,
        stop: Callable[[], bool],
        report: Callable[[Counts], None] | None,
    ) -> Run:
        waits = Waits(chosen.lock_timeout, chosen.statement_timeout)
        found = self._engines.find(self.name, engine, app)
        lease = chosen.lease + chosen.pause
        turn = Turn(found, self.name, lease, hosts.schema(app), waits)
        reports: list[progress.Report] = [progress.Log(self.name)]
        if report is not None:
            reports.append(report)
        return Run(turn, chosen, app, stop, progress.each(reports))

    def _in_turn(self, run: Run) -> None:
        self._advise(run)
        try:
            self._work(run)
        except TurnTaken as error:
            logger.warning("%s", error)
            run.counts.stopped = error.stop
            return
        self._count(run, _COUNTED)

    def _count(self, run: Run, most: int) -> None:
        with run.turn.reading() as connection:
            for rule, pick in self.picks(run.now).items():
                found = int(connection.execute(pick.count(most)).scalar() or 0)
                run.counts.left += found
                if most == _COUNTED_DRY and rule:
                    run.counts.rules[rule] = found

    def _advise(self, run: Run) -> None:
        if advice.asked_before(self):
            return
        with run.turn.reading() as connection:
            for pick in self.picks(run.now).values():
                advice.warn(connection, self.name, pick)

    # -- Celery

    def register(self, app: Celery, engine: EngineSource = None) -> Any:
        """Make the sweep a task of an app, and known to its command line; return the task.

        Parameters:
            engine: as in the class.

        Raises:
            ConfigurationError: the app has another sweep of this name.
        """
        registry.add(app, self)
        self._app = app
        if engine is not None:
            self._engines = hosts.Engines(engine)
        if self.task_name in app._tasks:
            return app._tasks[self.task_name]

        def sweep(task: Task, **overrides: Any) -> dict[str, Any]:
            """Run the sweep; keyword arguments are options for this run."""
            found = self.run(app=app, report=progress.TaskState(task), **overrides)
            return found.as_dict()

        make = app.task(
            name=self.task_name, base=Task, bind=True, acks_late=False, shared=False, lazy=False
        )
        return make(sweep)

    def beat_entry(
        self, schedule: Any, queue: str | None = None, **overrides: Any
    ) -> dict[str, dict[str, Any]]:
        """Return the entry for ``app.conf.beat_schedule`` that runs the sweep.

        Messages of a schedule in seconds expire with the next one, so that they never pile up.

        Parameters:
            schedule: seconds, ``timedelta`` or ``crontab``.
            queue: the queue of the task.
            overrides: further keys of the entry; ``options`` are merged, ``kwargs`` are options
                of the runs.
        """
        sending: dict[str, Any] = {}
        if isinstance(schedule, timedelta):
            sending["expires"] = schedule.total_seconds()
        elif isinstance(schedule, (int, float)):
            sending["expires"] = float(schedule)
        if queue is not None:
            sending["queue"] = queue
        sending.update(overrides.pop("options", {}))
        entry = {"task": self.task_name, "schedule": schedule, "options": sending, **overrides}
        return {self.task_name: entry}


def _give(run: Run) -> None:
    run.counts.seconds = run.seconds
    try:
        run.turn.give(run.counts)
    except SQLAlchemyError as error:
        logger.warning("The turn of this run ends with its lease: %r", error)


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ConfigurationError("now must have a time zone: datetime.now(timezone.utc)")
    return moment.astimezone(timezone.utc)
