"""Orphans are found and put back to work: ``run_once`` does one bounded pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from sqlalchemy import Connection, Row

from celery_pgbarrier import barrier, capture, relay, repair, sweeps
from celery_pgbarrier.errors import DatabaseUnavailable, HolderLost, PgBarrierError, TaskCrashed
from celery_pgbarrier.lease import Held, Loss, put_back
from celery_pgbarrier.store import sql
from celery_pgbarrier.sweeps import shutdown
from celery_pgbarrier.sweeps.engine import Batch, Limits, run_batches
from celery_pgbarrier.unit import Fence, Stamp

logger = logging.getLogger(__name__)

#: Batches of each kind in one pass; what is left is the next pass's.
_MOST_BATCHES = 100
#: Batches of expired tasks grow up to so many times the batch size, while one takes less than the
#: one and not more than the other (seconds).
_LARGEST, _QUICK, _SLOW = 16, 0.015, 0.03

#: How long two passes lie apart at most, in reap intervals.
_LONGEST_PAUSE = 1.25


class Failing(barrier.Releasing, relay.GivingUp, Protocol):
    """A host that can fail a task from its recorded message."""

    def fail_recorded(self, task_id: str, token: str | None, error: Exception) -> bool:
        """Store *error* as the task's outcome, with all that follows from it."""
        ...


@dataclass
class Counts:
    """What a pass did: how many workers were declared dead, tasks put back..."""

    workers_dead: int = 0
    tasks_released: int = 0
    tasks_failed: int = 0
    messages_published: int = 0
    messages_deferred: int = 0
    barriers_recounted: int = 0
    members_revived: int = 0
    barriers_released: int = 0
    rows_purged: int = 0

    @property
    def total(self) -> int:
        """How many things were mended or purged."""
        counts: list[int] = list(asdict(self).values())
        return sum(counts) - self.messages_deferred


def run_once(host: Failing) -> Counts:
    """Do one pass over all orphans; any number of passes may run at once.

    Returns what was done.  Errors of single tasks are logged and do not stop the pass.

    Raises:
        DatabaseUnavailable: PostgreSQL is away; the next pass goes on.
    """
    counts = Counts()
    _bury(host, counts)
    _release_claims(host, counts)
    mended = repair.check(host)
    counts.barriers_recounted += mended.barriers_recounted
    counts.members_revived += mended.members_revived
    _release_barriers(host, counts)
    counts.messages_published += relay.publish_interrupted(host)
    relayed = relay.publish_due(host)
    counts.messages_published += relayed.published + relay.publish_lost(host)
    counts.messages_deferred += relayed.deferred
    counts.tasks_failed += relayed.given_up
    counts.rows_purged += purge(host, batches=_MOST_BATCHES)
    if counts.total:
        logger.info("Reaped: %s", counts)
    return counts


def take_turn(host: Failing, interval: float) -> bool:
    """Tell whether this process is to do the pass of this interval (seconds)."""
    return host.database.count(sql.REAPER_TURN, {"interval": interval * 0.9}) == 1


# -- dead holders


def _bury(host: Failing, counts: Counts) -> None:
    settings = host.settings
    # Early by the time that may pass until the next look, so that the second one comes within
    # lease + 2 heartbeats + reap interval.
    early = min(_LONGEST_PAUSE * settings.reap_interval, settings.lease / 2)
    host.database.count(sql.WORKERS_SUSPECT, {"silence": settings.lease - early})
    looks = {"patience": 2 * settings.heartbeat, "lease": settings.lease}
    counts.workers_dead += host.database.count(sql.WORKERS_DEAD, looks)


def _release_claims(host: Failing, counts: Counts) -> None:
    limit = host.settings.batch_size
    for _ in range(_MOST_BATCHES):
        lost = host.database.statement(sql.CLAIMS_LOST, {"limit": limit})
        settled = sum(settle_claim(host, row, row.holder == "dead", counts) for row in lost)
        if len(lost) < limit or not settled:
            return


def settle_claim(host: Failing, row: Row[Any], crash: bool, counts: Counts) -> bool:
    """Put back or fail one claim whose process is gone; one transaction a task.

    Two reapers that settle the same claim do no harm: the token, or for a plain task its worker,
    lets one of them through.
    """
    try:
        if not row.rerun:
            error: PgBarrierError = HolderLost(
                f"the worker that ran {row.name} died; the task is not run again, "
                "because it neither is a BarrierTask nor has acks_late"
            )
            counts.tasks_failed += _fail(host, row, error)
            return True
        loss = put_back(host, Held(row.id, "running", row.token, row.worker), crash, 1.0)
        if loss is Loss.RELEASED:
            counts.tasks_released += 1
        elif loss is Loss.SPENT:
            counts.tasks_failed += _fail(host, row, crashed(host, row.name))
        return loss is not Loss.UNKNOWN
    except Exception:
        logger.exception("Task %s is settled in a later pass", row.id)
        return False


def _fail(host: Failing, row: Row[Any], error: PgBarrierError) -> bool:
    fence = partial(
        Fence, worker=row.worker, pid=row.pid, stamp=Stamp(row.call, row.seq, recorded=True)
    )
    with nullcontext() if row.token else capture.parent_fence(row.id, fence):
        return host.fail_recorded(row.id, row.token, error)


def crashed(host: Failing, name: str | None) -> TaskCrashed:
    """Return the error of a task whose crashes are spent."""
    limit = host.settings.max_crashes
    return TaskCrashed(f"{name} died with its process {limit} times (pgbarrier_max_crashes)")


# -- barriers


def _release_barriers(host: Failing, counts: Counts) -> None:
    parameters = {"grace": min(host.settings.publish_grace, 1.0), "limit": host.settings.batch_size}
    for row in host.database.statement(sql.BARRIERS_READY, parameters):
        try:
            counts.barriers_released += barrier.release(host, row.id)
        except Exception:
            logger.exception("Chord %s is released in a later pass", row.id)


# -- purge


def purge(host: barrier.Releasing, batches: int | None = None) -> int:
    """Delete expired rows in batches, each its own transaction; return how many rows went.

    Parameters:
        batches: at most so many batches of each kind; None for all there is.
    """
    limits = Limits(host.settings.batch_size, max_batches=batches)
    done = sweeps.Counts()
    for step in (
        _tasks_purge(host),
        partial(_purge_rows, host, sql.PURGE_GROUPS),
        partial(_purge_rows, host, sql.PURGE_POISON),
        partial(_purge_barriers, host),
        partial(_purge_rows, host, sql.PURGE_EFFECTS),  # after their tasks
    ):
        run_batches(step, limits, done, stop=shutdown.stopping)
    day = max(host.settings.lease * 10, 3600.0)
    return done.rows + host.database.count(sql.WORKERS_PURGE, {"age": day})


def _tasks_purge(host: barrier.Releasing) -> Callable[[int], Batch]:
    """Return what deletes a batch of expired tasks, each time from where it got to."""
    since: Any = "-infinity"
    scale = 1

    def purge_tasks(size: int) -> Batch:
        nonlocal since, scale
        ahead = {"since": since, "limit": size * scale}
        found = host.database.statement(sql.PURGE_BOUND, ahead)
        until = found[0].expires_at if found else since
        if until != since:  # where all of them expired at once no bound would keep a batch small
            began = time.monotonic()
            try:
                rows = host.database.count(sql.PURGE_TASKS, {"since": since, "until": until})
            except DatabaseUnavailable as error:
                logger.debug("Expired rows are locked, or PostgreSQL is away: %s", error)
            else:
                since, took = until, time.monotonic() - began
                if took < _QUICK:
                    scale = min(scale * 2, _LARGEST)
                elif took > _SLOW:
                    scale = max(scale // 2, 1)
                return Batch(rows, more=True)
        scale = 1
        place = {"limit": size, "since": since}
        (gone,) = host.database.statement(sql.PURGE_UNLOCKED, place)
        since = gone.until or since
        return Batch(gone.rows, more=gone.rows >= size)

    return purge_tasks


def _purge_rows(host: barrier.Releasing, statement: str, size: int) -> Batch:
    rows = host.database.count(statement, {"limit": size, "keep": host.keep})
    return Batch(rows, more=rows >= size)


def _purge_barriers(host: barrier.Releasing, size: int) -> Batch:
    rows = host.database.transaction(lambda conn: _purge_some_barriers(conn, host, size))
    return Batch(rows, more=rows >= size)


def _purge_some_barriers(connection: Connection, host: barrier.Releasing, limit: int) -> int:
    """Delete expired barriers with their members until *limit* rows have gone."""
    rows = 0
    while rows < limit:
        gone = _purge_barrier(connection, host, limit - rows)
        if not gone:
            break
        rows += gone
    return rows


def _purge_barrier(connection: Connection, host: barrier.Releasing, limit: int) -> int:
    statements = host.database.sql
    barrier_id = connection.execute(statements[sql.EXPIRED_BARRIER]).scalar()
    if barrier_id is None:
        return 0
    members = connection.execute(
        statements[sql.PURGE_MEMBERS], {"id": barrier_id, "limit": limit}
    ).rowcount
    if members == limit:
        return members
    return members + connection.execute(statements[sql.PURGE_BARRIER], {"id": barrier_id}).rowcount
