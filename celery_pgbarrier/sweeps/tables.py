"""A user's table: a mapped class or a Core table, its key, and its rows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.attributes import InstrumentedAttribute

from celery_pgbarrier.errors import ConfigurationError

Table = sa.Table | type[Any]
Condition = sa.ColumnElement[bool] | Callable[[datetime], sa.ColumnElement[bool]]
Column = str | sa.Column[Any] | InstrumentedAttribute[Any]
Key = tuple[Any, ...]


class Target:
    """The table that a sweep works on.

    Parameters:
        source: a mapped class or a :class:`sqlalchemy.Table`.
        key: the columns that identify a row, where the table has no primary key.

    Raises:
        ConfigurationError: it is neither, it is mapped to a join, or it has no key.
    """

    def __init__(self, source: Table, key: Sequence[Column] = ()) -> None:
        self.source = source
        self.mapper: Mapper[Any] | None = None
        if isinstance(source, sa.Table):
            self.table = source
        else:
            self.mapper = _mapper(source)
            self.table = _own_table(self.mapper)
        self.key = tuple(self.column(part) for part in key) or tuple(self.table.primary_key)
        if not self.key:
            raise ConfigurationError(
                f"table {self.name} has no primary key: name the columns that identify a row "
                "with key=(...)"
            )

    @property
    def name(self) -> str:
        """The table's name with its schema."""
        return self.table.fullname

    def column(self, name: Column) -> sa.Column[Any]:
        """Return a column by its object, its mapped attribute or either's name.

        Raises:
            ConfigurationError: the table has no such column; the nearest name is given.
        """
        if isinstance(name, InstrumentedAttribute):
            name = name.key
        if isinstance(name, sa.Column):
            name = name.key
        columns: Any = self.mapper.columns if self.mapper else self.table.c
        for names in (columns, self.table.c):
            if name in names:
                found: sa.Column[Any] = names[name]
                return found
        near = difflib.get_close_matches(name, list(columns.keys()), 1, 0.0)
        raise ConfigurationError(f"{self.name} has no column {name!r}: did you mean {near[0]!r}?")

    def condition(self, where: Condition, now: datetime) -> sa.ColumnElement[bool]:
        """Return the filter at a moment; other classes' rows of a shared table never match."""
        found = where(now) if callable(where) else where
        return found if self._own_rows is None else sa.and_(self._own_rows, found)

    @cached_property
    def _own_rows(self) -> sa.ColumnElement[bool] | None:
        mapper = self.mapper
        if mapper is None or not mapper.inherits or mapper.polymorphic_on is None:
            return None
        identities = [each.polymorphic_identity for each in mapper.self_and_descendants]
        return mapper.polymorphic_on.in_(identities)

    def matches(self, keys: Sequence[Key]) -> sa.ColumnElement[bool]:
        """Return the condition that a row's key is one of *keys*."""
        if len(self.key) == 1:
            return self.key[0].in_([key[0] for key in keys])
        return sa.tuple_(*self.key).in_(list(keys))

    def joined(self, batch: sa.CTE) -> sa.ColumnElement[bool]:
        """Return the condition that a row is one of a batch of keys."""
        return sa.and_(*(column == batch.c[column.name] for column in self.key))

    def rows(
        self, connection: sa.Connection, narrow: Callable[[Any], Any], load: Sequence[Any] = ()
    ) -> list[tuple[Key, Any]]:
        """Return rows with their keys: detached instances of a mapped class, or Core rows.

        Parameters:
            narrow: adds filter, order, limit and lock to the bare SELECT.
            load: ORM loader options, such as ``selectinload(Document.files)``.
        """
        if self.mapper is None:
            found = connection.execute(narrow(sa.select(self.table))).all()
            return [(tuple(row._mapping[part] for part in self.key), row) for row in found]
        properties = [self.mapper.get_property_by_column(part).key for part in self.key]
        # An instance that is still attached would run its lazy loads in the batch's transaction,
        # where one that fails takes the whole batch with it.
        with Session(bind=connection, autoflush=False) as session:
            statement = narrow(sa.select(self.mapper.class_).options(*load))
            instances = session.scalars(statement).all()
            session.expunge_all()
        return [(tuple(getattr(row, name) for name in properties), row) for row in instances]


def _mapper(source: Any) -> Mapper[Any]:
    mapper: Any = sa.inspect(source, raiseerr=False) if isinstance(source, type) else None
    if not isinstance(mapper, Mapper):
        raise ConfigurationError(f"{source!r} is neither a mapped class nor a Table")
    found: Mapper[Any] = mapper
    return found


def _own_table(mapper: Mapper[Any]) -> sa.Table:
    table: Any = mapper.local_table
    if not isinstance(table, sa.Table) or mapper.persist_selectable is not table:
        raise ConfigurationError(
            f"{mapper.class_.__name__} is mapped to more than one table: give the Table whose "
            "rows are meant"
        )
    return table
