"""The marker of a step, and what is known of a transaction whose end was not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from celery_pgbarrier.effects import trouble
from celery_pgbarrier.effects.target import Target
from celery_pgbarrier.errors import ClaimLost, ConfigurationError
from celery_pgbarrier.lease import Attempt
from celery_pgbarrier.store import sql
from celery_pgbarrier.unit import Host

#: SQLSTATEs of a database that lacks our tables: undefined table, undefined schema.
_NOT_OURS = ("42P01", "3F000")


@dataclass(frozen=True)
class Found:
    """A step as it stands: whether it is done, by which claim, with which encoded value.

    ``claimed``: the task's row has the attempt's claim; ``absent``: there is no row, because that
    claim made it and a crash of the server took it back, or because it is in another database.
    """

    claimed: bool
    absent: bool
    done: bool
    token: str | None
    value: bytes | None


class Marker:
    """The marker of one step of one attempt.

    Parameters:
        replaced: how often the task has replaced itself: each replacement has steps of its own.
    """

    def __init__(self, host: Host, attempt: Attempt, name: str, step: str, replaced: int) -> None:
        self._host, self._attempt, self._name, self._step = host, attempt, name, step
        stamp = attempt.stamp
        self._key: dict[str, Any] = {
            "id": attempt.task_id,
            "call": stamp.call,
            "seq": stamp.seq,
            "recorded": stamp.recorded,
            "attempt": attempt.number,
            "token": attempt.token,
            "replaced": replaced,
            "step": step,
        }

    @property
    def token(self) -> str:
        """The claim that the marker is written under."""
        return self._attempt.token

    def find(self, target: Target) -> Found:
        """Look the step up through the user's connection.

        Raises:
            ConfigurationError: the connection leads to another database.
            ClaimLost: another run of the task stands.
        """
        try:
            found = _found(target.execute(self._host.database.sql[sql.EFFECT_FIND], self._key))
        except Exception as error:
            if trouble.sqlstate(error) in _NOT_OURS:
                raise self._elsewhere() from error
            raise
        if not found.claimed:
            row = self._look()
            if row.claimed:
                raise self._elsewhere()
            if not (found.absent and row.absent):
                raise self.lost()
        return found

    def record(self, target: Target, value: bytes | None) -> bool:
        """Leave the marker as the last statement before COMMIT; False where there is one.

        Raises:
            ClaimLost: another run of the task stands.
        """
        pause = f"{max(1, round(self._host.settings.heartbeat * 1000))}ms"
        parameters = {**self._key, "value": value, "pause": pause}
        row = target.execute(self._host.database.sql[sql.EFFECT_RECORD], parameters).one()
        if not row.claimed:
            raise self.lost()
        return bool(row.recorded)

    def settle(self) -> Found:
        """Tell what has become of a COMMIT whose answer was lost, once it has taken effect or not.

        Raises:
            DatabaseRetryLater: PostgreSQL was away for ``pgbarrier_outcome_timeout``.
        """
        statements, key = self._host.database.sql, self._key

        def work(connection: Connection) -> Found:
            connection.execute(statements[sql.EFFECT_SETTLING], {"id": key["id"]})
            return _found(connection.execute(statements[sql.EFFECT_FIND], key))

        return self._host.database.transaction(work, self._host.settings.outcome_timeout)

    def _look(self) -> Found:
        patience = self._host.settings.dispatch_timeout
        rows = self._host.database.statement(sql.EFFECT_FIND, self._key, patience)
        return _read(rows[0])

    def lost(self) -> ClaimLost:
        """Return the error of an attempt that another one has overtaken."""
        return ClaimLost(
            f"step {self._step!r} of {self._name}[{self._attempt.task_id}] is rolled back: this "
            "run was taken for dead, and the task has passed to another run"
        )

    def _elsewhere(self) -> ConfigurationError:
        return ConfigurationError(
            f"self.transaction({self._step!r}) of {self._name} was given a connection to another "
            "database than the result backend's, where the task's row is: writes can be committed "
            "with their marker in one database only; point both at the same database, and "
            "pgbarrier_schema at the schema of the pgbarrier tables"
        )


def _found(result: Any) -> Found:
    return _read(result.one())


def _read(row: Any) -> Found:
    value = None if row.value is None else bytes(row.value)
    return Found(bool(row.claimed), bool(row.absent), bool(row.done), row.token, value)
