"""Outcomes of many tasks: committed together, or one by one where that cannot be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from celery_pgbarrier import barrier
from celery_pgbarrier.errors import DatabaseUnavailable
from celery_pgbarrier.reaper import Failing
from celery_pgbarrier.store import sql
from celery_pgbarrier.unit import Outcome, Unit
from celery_pgbarrier.writing import Committed, batch_parameters, write_batch

logger = logging.getLogger(__name__)

_Send = Callable[[Unit, Committed], None]


@contextmanager
def logged(what: str) -> Iterator[None]:
    """Log an error of one and go on with the others."""
    try:
        yield
    except Exception:
        logger.exception("%s", what)


def commit(host: Failing, units: list[Unit], send: _Send) -> None:
    """Commit outcomes: those of members in one transaction, those of other tasks in another.

    Parameters:
        send: what does what follows: it must not wait for the broker.
    """
    for statement, members in ((sql.FINISH_ALONES, False), (sql.FINISH_MEMBERS, True)):
        left = {}
        for unit in units:
            outcome = unit.primary
            assert isinstance(outcome, Outcome)
            if (outcome.fence.barrier is not None) is members:
                left[outcome.task_id] = unit
        with logged("Outcomes are lost, their tasks run again"):
            if len(left) > 1:
                send(*_commit_many(host, statement, left))
            for task_id, unit in left.items():
                with logged(f"The outcome of task {task_id} is lost, it runs again"):
                    _commit_one(host, task_id, unit, send)


def _commit_many(host: Failing, statement: str, left: dict[str, Unit]) -> tuple[Unit, Committed]:
    """Commit outcomes and take the accepted ones out of *left*; return what follows from them."""
    patience, units = host.settings.outcome_timeout, list(left.values())
    followed = Unit()
    try:
        if all(unit.plain for unit in units):
            parameters = batch_parameters(host, units)
            rows = host.database.statement(statement, parameters, patience)
        else:
            write = partial(write_batch, host=host, statement=statement, units=left)
            rows = host.database.transaction(write, patience)
    except DatabaseUnavailable:
        raise
    except Exception as error:  # of one of them: which one is seen one by one
        logger.info("Outcomes are committed one by one: %s", error)
        return followed, Committed()
    for row in rows:
        if row.id in left:
            followed.events += left.pop(row.id).events
    return followed, Committed([row.ready for row in rows if row.ready])


def _commit_one(host: Failing, task_id: str, unit: Unit, send: _Send) -> None:
    try:
        committed = barrier.commit(host, unit, host.settings.outcome_timeout)
    except DatabaseUnavailable as error:
        logger.error("The outcome of task %s is given up: %s", task_id, error)
        return
    except Exception as error:
        # A conflict, or something that PostgreSQL cannot store: it would be so each time.
        assert unit.primary is not None
        logger.error("What follows from task %s cannot be recorded: %s", task_id, error)
        host.fail_recorded(task_id, unit.primary.fence.token, error)
        return
    if committed is None:
        logger.warning("An outcome of task %s was refused: another run of it stands", task_id)
    else:
        send(unit, committed)
