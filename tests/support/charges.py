"""What blocks of ``self.transaction()`` write in tests: a table of the user's own."""

from __future__ import annotations

from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.exceptions import WorkerTerminate
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.support.inline import InlineWorker

TABLE = "CREATE TABLE IF NOT EXISTS charge (id serial PRIMARY KEY, name text NOT NULL)"


class Base(DeclarativeBase):
    pass


class Charge(Base):
    """A row that must be there once."""

    __tablename__ = "charge"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def charge(tx: Any, name: str = "once") -> None:
    """Write a charge through a transaction's session."""
    tx.session.add(Charge(name=name))


class Died(WorkerTerminate):
    """Ends a run where it stands, as the death of its process does."""


def die(worker: InlineWorker) -> None:
    """Run a message whose task raises :exc:`Died`; the worker's parent sees its process die."""
    request = worker.take()
    assert request is not None
    with pytest.raises(Died):
        worker.run(request)
    try:
        raise WorkerLostError("its process is gone")
    except WorkerLostError:
        lost = ExceptionInfo()
    with worker.identity():
        request.on_failure(lost)
