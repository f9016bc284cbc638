"""Set a status on stale rows, one bounded statement a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from celery_pgbarrier.sweeps.base import Run, Sweep
from celery_pgbarrier.sweeps.batches import Pick, Update
from celery_pgbarrier.sweeps.hosts import EngineSource
from celery_pgbarrier.sweeps.steps import statement_batch
from celery_pgbarrier.sweeps.tables import Column, Condition, Table
from celery_pgbarrier.sweeps.values import Assignments, Values

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from celery_pgbarrier.sweeps.options import OptionValues


class Expire(Sweep):
    """Sets values on the rows that match, 1,000 rows a statement; no row is read into Python.

    Rows that have the values already are left alone.  Of a row that refuses its update (a
    constraint, a trigger) the error is reported; the others are updated.

    Parameters:
        where: which rows: an SQLAlchemy expression, or a function of the database's ``now``.
        values: what is set, by column or its name: plain values, functions of ``now``, SQL
            expressions; at least one that is no expression (``func.now()`` counts as plain).
        terminal: values that end a row's life, by column: ``{"status": ("done", "failed")}``.
            Such rows are left alone, whatever *where* says.

    More parameters, methods and errors: :class:`~celery_pgbarrier.sweeps.Sweep`.
    """

    def __init__(
        self,
        name: str,
        table: Table,
        *,
        where: Condition,
        values: Values,
        terminal: Mapping[Any, Sequence[Any]] | None = None,
        key: Sequence[Column] = (),
        order_by: Any = (),
        engine: EngineSource = None,
        **options: Unpack[OptionValues],
    ) -> None:
        super().__init__(name, table, key=key, order_by=order_by, engine=engine, **options)
        self._where = where
        self._values = Assignments(self.target, values)
        self._terminal = [
            (self.target.column(column), list(ends)) for column, ends in (terminal or {}).items()
        ]

    def picks(self, now: datetime) -> dict[str, Pick]:
        """Return the rows that match and do not have the values yet."""
        alive = [sa.or_(column.is_(None), column.not_in(ends)) for column, ends in self._terminal]
        found = sa.and_(self.target.condition(self._where, now), *alive, self._values.lacking(now))
        return {"": Pick(self.target, found, self._order)}

    def _work(self, run: Run) -> None:
        step = partial(
            statement_batch, run, self.picks(run.now)[""], Update(self._values.at(run.now))
        )
        run.repeat(step)
