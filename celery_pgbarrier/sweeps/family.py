"""A parent row, its child rows and a message for each child: all of them, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from celery import Celery
from sqlalchemy import Engine

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps import hosts, outbox
from celery_pgbarrier.sweeps.revive import Rule
from celery_pgbarrier.sweeps.tables import Column, Key, Table, Target
from celery_pgbarrier.sweeps.values import Values


@dataclass(frozen=True)
class Inserted:
    """What :meth:`Family.insert` committed: rows as they are now, and the ids of the tasks sent."""

    parent: Any
    children: list[Any]
    task_ids: list[str]


class Family:
    """Parents and children that are only ever recorded together.

    Parameters:
        parent, child: mapped classes or Core tables.
        link: the child's columns that refer to the parent, with the parent's columns.
        task: the name of the task to send for each child.
        args, kwargs: functions of the child's row that return the task's arguments.
        options: what :meth:`celery.Celery.send_task` takes besides.
        send: in place of *task*, a function of the child's row that sends what it likes.

    Raises:
        ConfigurationError: a table or column that cannot be used.
    """

    def __init__(
        self,
        parent: Table,
        child: Table,
        *,
        link: Mapping[Any, Column],
        task: str | None = None,
        args: Callable[[Any], Sequence[Any]] = lambda child: (),
        kwargs: Callable[[Any], Mapping[str, Any]] = lambda child: {},
        options: Mapping[str, Any] | None = None,
        send: Callable[[Any], Any] | None = None,
    ) -> None:
        self._parent, self._child = Target(parent), Target(child)
        self._link = {self._child.column(a): self._parent.column(b) for a, b in link.items()}
        self._message = Rule(
            "child", sa.true(), {}, task=task, args=args, kwargs=kwargs,
            options=options or {}, send=send,
        )  # fmt: skip
        if not self._link or not self._message.sends:
            raise ConfigurationError("a family needs link={Child.column: Parent.column} and a task")

    def insert(
        self,
        app: Celery,
        parent: Mapping[Any, Any],
        children: Sequence[Mapping[Any, Any]],
        engine: Engine | None = None,
    ) -> Inserted:
        """Insert a parent and its children and send a task for each child, in one transaction.

        Where anything fails, nothing is inserted and nothing is sent.  What the broker does not
        take after the commit, the reaper publishes.

        Parameters:
            parent, children: column values by column or name; the link is filled in.
            engine: the database of both tables; that of the result backend if it is not given.

        Raises:
            ConfigurationError: the app has no ``pgbarrier`` result backend, or the tables are in
                another database.
            ValueError: there are no children.
        """
        if not children:
            raise ValueError("a parent without children would never finish")
        host = hosts.publisher(f"a family of {self._parent.name}", app)
        engine = (engine or host.database.engine()).execution_options(
            isolation_level="READ COMMITTED"  # the backend's commits each statement by itself
        )
        with engine.begin() as connection:
            hosts.same_database(connection, host, f"a family of {self._parent.name}")
            row = _inserted(connection, self._parent, [parent])[0]
            linked = {child: row._mapping[column] for child, column in self._link.items()}
            rows = _inserted(connection, self._child, children, linked)
            send = self._message.sender(app)
            letters = [outbox.caught(self._key(child), child, send) for child in rows]
            outbox.write(connection, host, letters)
        outbox.publish(host, letters)
        sent = [message.task_id for letter in letters for message in letter.unit.messages]
        return Inserted(row, rows, sent)

    def childless(
        self,
        where: sa.ColumnElement[bool] | Callable[[datetime], sa.ColumnElement[bool]],
        values: Values,
        name: str = "childless",
    ) -> Rule:
        """Return the rule that stamps parents which other code left without children.

        Parameters:
            where: which parents are old enough to have children by now.
            values: what they get, such as ``{"state": "failed"}``.
        """
        child = self._child.table.alias()
        joined = sa.and_(*(child.c[a.key] == b for a, b in self._link.items()))
        without = ~sa.exists().where(joined).correlate(self._parent.table)

        def stuck(now: datetime) -> sa.ColumnElement[bool]:
            return sa.and_(self._parent.condition(where, now), without)

        return Rule(name, stuck, values)

    def _key(self, row: Any) -> Key:
        return tuple(row._mapping[part] for part in self._child.key)


def _inserted(
    connection: sa.Connection,
    target: Target,
    rows: Sequence[Mapping[Any, Any]],
    further: Mapping[sa.Column[Any], Any] | None = None,
) -> list[Any]:
    values = [
        {
            column.key: value
            for column, value in [
                *((target.column(name), value) for name, value in row.items()),
                *(further or {}).items(),
            ]
        }
        for row in rows
    ]
    statement = sa.insert(target.table).returning(*target.table.c, sort_by_parameter_order=True)
    return list(connection.execute(statement, values))
