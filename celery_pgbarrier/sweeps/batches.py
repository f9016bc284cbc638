"""One batch: pick rows from the top of a filter, lock them, act on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

from celery_pgbarrier.store.trouble import is_transient
from celery_pgbarrier.sweeps.tables import Key, Target

T = TypeVar("T")


@dataclass(frozen=True)
class Pick:
    """Which rows of a table are next: a filter and an order, without those that failed before."""

    target: Target
    condition: sa.ColumnElement[bool]
    order: tuple[sa.ColumnElement[Any], ...]
    deleting: bool = False

    def narrow(self, statement: Any, size: int, failed: Sequence[Key]) -> Any:
        """Add filter, order, limit and lock to a SELECT from the table."""
        statement = statement.where(self.condition)
        if failed:
            statement = statement.where(~self.target.matches(failed))
        # A row that is only updated leaves those who insert rows that refer to it alone.
        lock = {"skip_locked": True, "of": self.target.table, "key_share": not self.deleting}
        return statement.order_by(*self.order).limit(size).with_for_update(**lock)

    def keys(self, size: int, failed: Sequence[Key] = ()) -> Any:
        """Return the SELECT of the next keys."""
        return self.narrow(sa.select(*self.target.key), size, failed)

    def batch(self, size: int, failed: Sequence[Key]) -> sa.CTE:
        """Return the next keys for use in an UPDATE or DELETE.

        A common table expression with a row lock is evaluated once; a subquery of ``IN`` may be
        evaluated again and again, and then picks more than its limit.
        """
        batch: sa.CTE = self.keys(size, failed).cte("batch")
        return batch

    def count(self, most: int) -> Any:
        """Return the SELECT of how many rows match, counted up to *most*."""
        found = sa.select(sa.literal(1)).select_from(self.target.table).where(self.condition)
        return sa.select(sa.func.count()).select_from(found.limit(most).subquery("found"))


class Action(Protocol):
    """What is done with picked rows."""

    def statement(self, target: Target, chosen: sa.ColumnElement[bool]) -> Any:
        """Return the statement that does it with the chosen rows."""
        ...


@dataclass(frozen=True)
class Delete:
    """The rows go."""

    def statement(self, target: Target, chosen: sa.ColumnElement[bool]) -> Any:
        """Return the DELETE of the chosen rows."""
        return sa.delete(target.table).where(chosen)


@dataclass(frozen=True)
class Update:
    """The rows get new values."""

    values: dict[sa.Column[Any], Any]

    def statement(self, target: Target, chosen: sa.ColumnElement[bool]) -> Any:
        """Return the UPDATE of the chosen rows."""
        return sa.update(target.table).where(chosen).values(self.values)


def isolate(
    connection: sa.Connection, items: Sequence[T], act: Callable[[Sequence[T]], Any]
) -> tuple[list[T], list[tuple[T, Exception]]]:
    """Do *act* with all items but those that it fails for, which are found by halving.

    Returns the items that it was done with, and the others with their errors.

    Raises:
        Exception: trouble that passes and concerns no single item.
    """
    if not items:
        return [], []
    try:
        with connection.begin_nested():
            act(items)
        return list(items), []
    except Exception as error:
        if is_transient(error) or connection.invalidated:
            raise
        if len(items) == 1:
            return [], [(items[0], error)]
    middle = len(items) // 2
    done, failed = isolate(connection, items[:middle], act)
    more_done, more_failed = isolate(connection, items[middle:], act)
    return done + more_done, failed + more_failed
