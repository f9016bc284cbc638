"""The block writes through Django's connection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from django.db import connections, transaction
from sqlalchemy import Result, TextClause
from sqlalchemy.engine import IteratorResult, make_url
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.orm import Session

from celery_pgbarrier.effects.target import Skipped
from celery_pgbarrier.errors import ConfigurationError, TransactionError
from celery_pgbarrier.store.database import commit

#: Both drivers take its form of parameters, ``%(name)s``.
_DIALECT = make_url("postgresql+psycopg2://").get_dialect()()


class _Rows(IteratorResult[Any]):
    """What a statement returned, as SQLAlchemy gives it."""

    def __init__(self, names: list[str], rows: list[Any], rowcount: int) -> None:
        super().__init__(SimpleResultMetaData(names), iter(rows))
        self.rowcount = rowcount


class DjangoTarget:
    """A Django database alias, in ``transaction.atomic``."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._atomic: Any = None

    @property
    def connection(self) -> Any:
        """Django's connection."""
        return connections[self._alias]

    @property
    def session(self) -> Session:
        """There is none: the block uses Django's models."""
        raise TransactionError(
            "a self.transaction() on a Django connection has no session: use Django's models, "
            "or tx.connection"
        )

    def begin(self) -> None:
        """Begin the transaction; see :class:`~celery_pgbarrier.effects.target.Target`."""
        connection = self.connection
        if connection.vendor != "postgresql":
            raise ConfigurationError(
                "self.transaction() needs the PostgreSQL database of the result backend; the "
                f"Django database {self._alias!r} is {connection.vendor}"
            )
        if connection.in_atomic_block and not _in_a_test_case(connection):
            raise TransactionError(
                f"the Django database {self._alias!r} is in an atomic block already: call "
                "self.transaction() outside of transaction.atomic(), it is one itself"
            )
        self._atomic = transaction.atomic(using=self._alias)
        self._atomic.__enter__()

    def execute(self, clause: TextClause, parameters: Mapping[str, Any]) -> Result[Any]:
        """Run a statement."""
        compiled = clause.compile(dialect=_DIALECT)
        with self.connection.cursor() as cursor:
            cursor.execute(compiled.string, compiled.construct_params(dict(parameters)))
            names = [column[0] for column in cursor.description or ()]
            rows = cursor.fetchall() if names else []
            return _Rows(names, rows, cursor.rowcount)

    def flush(self) -> None:
        """Django leaves nothing pending."""

    def commit(self) -> None:
        """Commit, and run what ``transaction.on_commit`` was given."""
        commit(_Ending(self._take()))

    def rollback(self) -> None:
        """Roll back."""
        atomic = self._take()
        if atomic is None:
            return
        if self.connection.in_atomic_block:  # it is not where the connection has been closed
            transaction.set_rollback(True, using=self._alias)
        atomic.__exit__(None, None, None)

    def _take(self) -> Any:
        atomic, self._atomic = self._atomic, None
        return atomic

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Let the next query raise :exc:`~celery_pgbarrier.effects.target.Skipped`."""
        with self.connection.execute_wrapper(_skip):
            yield

    def close(self) -> None:
        """The connection is Django's."""
        self.rollback()


class _Ending:
    """The end of an atomic block, as what commits."""

    def __init__(self, atomic: Any) -> None:
        self._atomic = atomic

    def commit(self) -> None:
        """Leave the block."""
        self._atomic.__exit__(None, None, None)


def _skip(*_: Any) -> None:
    raise Skipped


def _in_a_test_case(connection: Any) -> bool:
    """Tell whether the only atomic blocks around are those of ``django.test.TestCase``."""
    blocks = getattr(connection, "atomic_blocks", ())
    return bool(blocks) and all(getattr(block, "_from_testcase", False) for block in blocks)
