"""Batches of plain statements, in which no row is read into Python as long as all goes well."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.exc import DBAPIError

from celery_pgbarrier.store.trouble import is_transient
from celery_pgbarrier.sweeps.base import Run
from celery_pgbarrier.sweeps.batches import Action, Pick, isolate
from celery_pgbarrier.sweeps.engine import Batch
from celery_pgbarrier.sweeps.tables import Key


def statement_batch(run: Run, pick: Pick, action: Action, size: int) -> Batch:
    """Act on the next rows with one statement; where a row refuses, find it and leave it."""
    target = pick.target
    batch = pick.batch(size, run.failed)
    try:
        with run.batch() as connection:
            rows = connection.execute(action.statement(target, target.joined(batch))).rowcount
    except DBAPIError as error:
        if is_transient(error):
            raise
        return _careful_batch(run, pick, action, size)
    return Batch(rows, more=rows >= size)


def _careful_batch(run: Run, pick: Pick, action: Action, size: int) -> Batch:
    with run.batch() as connection:
        rows = connection.execute(pick.keys(size, run.failed)).all()
        keys: list[Key] = [tuple(row) for row in rows]

        def act(chosen: Sequence[Key]) -> None:
            connection.execute(action.statement(pick.target, pick.target.matches(chosen)))

        done, failed = isolate(connection, keys, act)
    for key, error in failed:
        run.fail(key, error)
    return Batch(len(done), more=len(keys) >= size)
