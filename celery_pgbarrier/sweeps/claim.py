"""Who may work on a row of the user's own: an atomic transition with a lease and attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps.tables import Column, Table, Target


@dataclass(frozen=True)
class Claimed:
    """A row that was claimed, or given up because its attempts are spent.

    ``attempt`` is the number of this grant, and the fence: pass it to :meth:`Claim.renew` and
    :meth:`Claim.finish`.  ``row`` has the columns as they are now.
    """

    key: tuple[Any, ...]
    attempt: int
    given_up: bool
    row: Any

    def __bool__(self) -> bool:
        return not self.given_up


class Claim:
    """Takes a job of the user's own table, whoever else wants it at the same time.

    One UPDATE takes a row that is free, or whose holder let its lease run out; it counts the
    attempt and sets the lease.  A second reviver, or a duplicate message, finds the row taken
    and gets None.  A row whose attempts are spent is given up.

    Parameters:
        table: a mapped class or a :class:`sqlalchemy.Table`.
        state: the column with the state.
        free: the states from which a row may be taken.
        running: the state of a row that is taken.
        lease: the column (with time zone) until when it is taken.
        seconds: for how long.
        attempts: the integer column that counts grants.
        limit: how many there may be.
        gave_up: the state after the last.
        values: further columns to set with a grant.

    Raises:
        ConfigurationError: a column that there is not, or a limit below 1.
    """

    def __init__(
        self,
        table: Table,
        *,
        state: Column,
        free: Sequence[Any],
        running: Any,
        lease: Column,
        seconds: float,
        attempts: Column,
        limit: int,
        gave_up: Any,
        values: Mapping[Any, Any] | None = None,
        key: Sequence[Column] = (),
    ) -> None:
        if limit < 1 or seconds <= 0:
            raise ConfigurationError("a claim needs limit >= 1 and seconds > 0")
        self._target = target = Target(table, key)
        self._state, self._lease = target.column(state), target.column(lease)
        self._attempts, self._limit = target.column(attempts), limit
        self._free, self._running, self._gave_up = list(free), running, gave_up
        self._seconds = seconds
        self._values = {target.column(name): value for name, value in (values or {}).items()}

    def take(self, connection: sa.Connection | Session, *key: Any) -> Claimed | None:
        """Claim the row with this key; None where another has it, it is finished or is not there.

        Commit before the work begins.  A :class:`Claimed` that is false was given up.
        """
        spent = self._attempts >= self._limit
        changed = {
            self._state: sa.case(
                (spent, self._bound(self._gave_up)), else_=self._bound(self._running)
            ),
            self._attempts: sa.case((spent, self._attempts), else_=self._attempts + 1),
            self._lease: sa.case((spent, sa.null()), else_=self._until()),
        }
        over = sa.and_(self._state == self._running, self._lease < sa.func.clock_timestamp())
        statement = (
            sa.update(self._target.table)
            .where(self._target.matches([key]), sa.or_(self._state.in_(self._free), over))
            .values({**self._values, **changed})
            .returning(*self._target.table.c)
        )
        row = connection.execute(statement).first()
        if row is None:
            return None
        found = row._mapping
        given_up = found[self._state] == self._gave_up
        return Claimed(tuple(key), found[self._attempts], given_up, row)

    def renew(self, connection: sa.Connection | Session, claimed: Claimed) -> bool:
        """Start the lease anew; False where the claim has passed on, and the work must stop."""
        return self._update(connection, claimed, {self._lease: self._until()})

    def finish(
        self,
        connection: sa.Connection | Session,
        claimed: Claimed,
        state: Any,
        values: Mapping[Any, Any] | None = None,
    ) -> bool:
        """Leave the running state; False where the claim has passed on: roll back then.

        In the transaction of the work's own writes, this makes them count once.
        """
        further = {self._target.column(name): value for name, value in (values or {}).items()}
        return self._update(
            connection, claimed, {**further, self._state: state, self._lease: sa.null()}
        )

    def _update(
        self, connection: sa.Connection | Session, claimed: Claimed, values: dict[Any, Any]
    ) -> bool:
        statement = (
            sa.update(self._target.table)
            .where(
                self._target.matches([claimed.key]),
                self._state == self._running,
                self._attempts == claimed.attempt,
            )
            .values(values)
            .returning(sa.literal(1))
        )
        return connection.execute(statement).first() is not None

    def _until(self) -> sa.ColumnElement[Any]:
        return sa.func.clock_timestamp() + sa.func.make_interval(0, 0, 0, 0, 0, 0, self._seconds)

    def _bound(self, value: Any) -> sa.ColumnElement[Any]:
        # A type that the server knows by name, such as an enum, is not inferred inside of CASE.
        return sa.cast(sa.literal(value, self._state.type), self._state.type)
