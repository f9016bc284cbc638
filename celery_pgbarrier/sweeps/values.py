"""The values that a sweep sets, and the condition that they are not set yet."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.functions import now as sql_now

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps.tables import Target

Values = Mapping[Any, Any]


class Assignments:
    """Columns with the values to set: plain ones, SQL expressions, or functions of ``now``.

    ``func.now()`` is the ``now`` of the run, so that it can be compared with.

    Parameters:
        what: the parameter that they were given as, for errors.

    Raises:
        ConfigurationError: nothing is set, or SQL expressions only: a row that still matches its
            filter afterwards would then be updated for ever.
    """

    def __init__(self, target: Target, values: Values, what: str = "values") -> None:
        self._target = target
        self._values = {target.column(name): value for name, value in values.items()}
        if not any(map(_comparable, self._values.items())):
            raise ConfigurationError(
                f"{what} of {target.name} must set a column to a plain value or a function of "
                "now: by that, rows that were handled are told from those that were not"
            )

    def at(self, now: datetime) -> dict[sa.Column[Any], Any]:
        """Return what to set at a moment."""
        return {column: _resolve(value, now) for column, value in self._values.items()}

    def outstanding(self, now: datetime) -> sa.ColumnElement[bool]:
        """Return the condition that a row was not given the values in this run."""
        return sa.or_(*(column.is_distinct_from(value) for column, value in self._plain(now)))

    def lacking(self, now: datetime) -> sa.ColumnElement[bool]:
        """Return the condition that a row was not given the values, in this run or another.

        What changes from run to run is compared only where nothing else is set.
        """
        fixed = [pair for pair in self._plain(now) if not _is_moving(self._values[pair[0]])]
        pairs = fixed or self._plain(now)
        return sa.or_(*(column.is_distinct_from(value) for column, value in pairs))

    def present(self, now: datetime) -> sa.ColumnElement[bool]:
        """Return the condition that a row has the values, in a form that an index serves."""
        return sa.and_(
            *(
                column.is_(None) if _resolve(self._values[column], now) is None else column == value
                for column, value in self._plain(now)
            )
        )

    @property
    def constant(self) -> bool:
        """Whether the values are the same in every run."""
        return all(not _is_moving(value) for value in self._values.values())

    def _plain(self, now: datetime) -> list[tuple[sa.Column[Any], sa.ColumnElement[Any]]]:
        # Cast as storing would, or a value that the column rounds would never compare equal.
        return [
            (column, sa.cast(sa.literal(_resolve(value, now), column.type), column.type))
            for column, value in self._values.items()
            if _comparable((column, value))
        ]


def _resolve(value: Any, now: datetime) -> Any:
    if isinstance(value, sql_now):
        return now
    return value(now) if callable(value) and not _is_expression(value) else value


def _is_expression(value: Any) -> bool:
    if isinstance(value, sql_now):
        return False
    return isinstance(value, ClauseElement) or hasattr(value, "__clause_element__")


def _is_moving(value: Any) -> bool:
    return _is_expression(value) or isinstance(value, sql_now) or callable(value)


def _comparable(item: tuple[sa.Column[Any], Any]) -> bool:
    column, value = item
    # The type json has no equality.
    plain_json = isinstance(column.type, sa.JSON) and not isinstance(column.type, JSONB)
    return not _is_expression(value) and not plain_json
