"""Delete rows that match a filter, with a hook for what cannot be taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps.base import Run, Sweep
from celery_pgbarrier.sweeps.batches import Action, Delete, Pick, Update, isolate
from celery_pgbarrier.sweeps.counts import Stop
from celery_pgbarrier.sweeps.engine import Batch
from celery_pgbarrier.sweeps.hosts import EngineSource
from celery_pgbarrier.sweeps.steps import statement_batch
from celery_pgbarrier.sweeps.tables import Column, Condition, Key, Table
from celery_pgbarrier.sweeps.values import Assignments, Values

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from celery_pgbarrier.sweeps.options import OptionValues

#: A batch whose hooks have taken so long (seconds) is committed with the rows that it has.
_LONG = 5.0


class Purge(Sweep):
    """Deletes the rows that match a filter, oldest key first, 100 rows a transaction.

    A hook does what cannot be taken back (files, vectors) before the row goes.  It must be
    idempotent: where the process dies, it runs again for the rows of the batch in hand.  A hook
    that raises leaves its row, which is reported and not tried again in this run; the others go
    on.  The same holds for a row that cannot be deleted, because others refer to it.

    Parameters:
        where: which rows go: an SQLAlchemy expression, or a function of the database's ``now``.
        before_delete: called with each row: a detached instance of the mapped class, or a Core
            row.
        on_error: "continue", or "abort" to stop at the first row whose hook raises; the rows
            before it are gone.  A row that cannot be deleted ends the run with its batch.
        mark: values that are set and committed before the hook runs, so that a row which looks
            alive never lacks its files.  A marked row goes, even when it no longer matches.
        marked: the condition that a row is marked, where *mark* does not say it by itself.
        load: ORM loader options for the hook's instances.

    More parameters, methods and errors: :class:`~celery_pgbarrier.sweeps.Sweep`.
    """

    default_batch_size = 100

    def __init__(
        self,
        name: str,
        table: Table,
        *,
        where: Condition,
        before_delete: Callable[[Any], object] | None = None,
        on_error: str = "continue",
        mark: Values | None = None,
        marked: Condition | None = None,
        load: Sequence[Any] = (),
        key: Sequence[Column] = (),
        order_by: Any = (),
        engine: EngineSource = None,
        **options: Unpack[OptionValues],
    ) -> None:
        super().__init__(name, table, key=key, order_by=order_by, engine=engine, **options)
        if on_error not in ("continue", "abort"):
            raise ConfigurationError(f'on_error must be "continue" or "abort", got {on_error!r}')
        self._where, self._hook, self._load = where, before_delete, tuple(load)
        self._abort = on_error == "abort"
        self._mark = None if mark is None else Assignments(self.target, mark, "mark")
        self._marked = marked
        if self._mark is not None and marked is None and not self._mark.constant:
            raise ConfigurationError(
                f"sweep {name}: what mark= sets differs from run to run, so say by what marked "
                "rows are known: marked=Document.purging_at.is_not(None)"
            )

    def picks(self, now: datetime) -> dict[str, Pick]:
        """Return the rows that match, marked ones among them."""
        found = self._matching(now)
        if self._mark is not None:
            found = sa.or_(found, self._is_marked(now))
        return {"": self._pick(found)}

    def _matching(self, now: datetime) -> sa.ColumnElement[bool]:
        return self.target.condition(self._where, now)

    def _action(self, now: datetime) -> Action:
        return Delete()

    def _is_marked(self, now: datetime) -> sa.ColumnElement[bool]:
        assert self._mark is not None
        marked = self._mark.present(now) if self._marked is None else self._marked
        return self.target.condition(marked, now)

    def _pick(self, condition: sa.ColumnElement[bool]) -> Pick:
        return Pick(self.target, condition, self._order, deleting=True)

    # -- a run

    def _work(self, run: Run) -> None:
        step: Callable[[int], Batch]
        matching = self._pick(self._matching(run.now))
        if self._mark is not None:
            step = partial(self._marked_batch, run)
        elif self._hook is not None or self._abort:
            step = partial(self._hooked_batch, run, matching)
        else:
            step = partial(statement_batch, run, matching, self._action(run.now))
        run.repeat(step)

    def _marked_batch(self, run: Run, size: int) -> Batch:
        """Purge what is marked already; where nothing is, mark the next rows and purge those."""
        assert self._mark is not None
        marked = self._pick(self._is_marked(run.now))
        left_over = self._hooked_batch(run, marked, size)
        if left_over.rows or left_over.more or left_over.stop:
            return Batch(left_over.rows, more=True, stop=left_over.stop)
        is_marked = self._is_marked(run.now)
        unmarked = sa.and_(self._matching(run.now), is_marked.is_not(sa.true()))
        setting = Update(self._mark.at(run.now))
        marking = statement_batch(run, self._pick(unmarked), setting, size)
        if not marking.rows:
            return marking
        done = self._hooked_batch(run, marked, size)
        return Batch(done.rows, more=True, stop=done.stop)

    def _hooked_batch(self, run: Run, pick: Pick, size: int) -> Batch:
        """Run the hook for the next rows, then delete those for which it did not raise."""
        target, action = pick.target, self._action(run.now)
        with run.batch() as connection:
            found = target.rows(
                connection, lambda select: pick.narrow(select, size, run.failed), self._load
            )
            keys, errors, cut = self._prepared(run, found)

            def act(chosen: Sequence[Key]) -> None:
                connection.execute(action.statement(target, target.matches(chosen)))

            done, failed = isolate(connection, keys, act)
        for key, error in [*errors, *failed]:
            run.fail(key, error)
        stop = Stop.ABORTED if self._abort and (errors or failed) else None
        return Batch(len(done), more=cut or len(found) >= size, stop=stop)

    def _prepared(
        self, run: Run, rows: Sequence[tuple[Key, Any]]
    ) -> tuple[list[Key], list[tuple[Key, Exception]], bool]:
        """Run the hooks; return the keys that may go, the failures, and whether rows are left."""
        keys: list[Key] = []
        errors: list[tuple[Key, Exception]] = []
        begun = time.monotonic()
        for key, row in rows:
            if keys and (run.stop() or time.monotonic() - begun > _LONG):
                return keys, errors, True
            try:
                if self._hook is not None:
                    self._hook(row)
            except Exception as error:
                errors.append((key, error))
                if self._abort:
                    break
            else:
                keys.append(key)
        return keys, errors, False


class SoftDelete(Purge):
    """Sets values on the rows that match, where :class:`Purge` would delete them.

    The stage before a purge: rows are marked as deleted now, and purged later by their mark.  A
    hook, ``on_error`` and the other parameters are those of :class:`Purge`.

    Parameters:
        values: what is set, such as ``{"deleted_at": func.now()}``; see
            :class:`~celery_pgbarrier.sweeps.Expire`.
        before: the hook.
    """

    def __init__(
        self,
        name: str,
        table: Table,
        *,
        where: Condition,
        values: Values,
        before: Callable[[Any], object] | None = None,
        on_error: str = "continue",
        load: Sequence[Any] = (),
        key: Sequence[Column] = (),
        order_by: Any = (),
        engine: EngineSource = None,
        **options: Unpack[OptionValues],
    ) -> None:
        super().__init__(
            name, table, where=where, before_delete=before, on_error=on_error, load=load,
            key=key, order_by=order_by, engine=engine, **options,
        )  # fmt: skip
        self._values = Assignments(self.target, values)

    def _matching(self, now: datetime) -> sa.ColumnElement[bool]:
        return sa.and_(super()._matching(now), self._values.lacking(now))

    def _action(self, now: datetime) -> Action:
        return Update(self._values.at(now))

    def _pick(self, condition: sa.ColumnElement[bool]) -> Pick:
        return Pick(self.target, condition, self._order)
