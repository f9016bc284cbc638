"""A chord's life: opened with its messages, member finished, released or failed.

Each step is one transaction; what it records is published after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from sqlalchemy import Connection

from celery_pgbarrier import faults, outbox, reference
from celery_pgbarrier.errors import (
    DatabaseRetryLater,
    DatabaseUnavailable,
    DispatchConflict,
    DispatchUnknown,
)
from celery_pgbarrier.reference import Page
from celery_pgbarrier.store import direct, sql
from celery_pgbarrier.store.database import Database
from celery_pgbarrier.unit import (
    Fence,
    HandOver,
    Host,
    Outcome,
    Stamp,
    Unit,
)
from celery_pgbarrier.writing import (
    Committed,
    Refused,
    outcome_parameters,
    outcome_statements,
    write,
)

logger = logging.getLogger(__name__)

#: Up to how many members' results come with the lock of their barrier.
_FEW = 100


@dataclass(frozen=True)
class Closing:
    """A barrier that is being released, with its members' encoded metadata.

    ``size`` is the header's, ``count`` that of all members, ``bytes`` what their metadata amount
    to.  ``members`` and ``doubtful`` give pages of ids and metadata in header order: of all
    members, and of those that may have failed.
    """

    id: str
    call: str
    body: bytes
    structure: bytes | None
    size: int
    count: int
    bytes: int
    members: Callable[[], Iterator[Page]]
    doubtful: Callable[[], Iterator[Page]]


class Releasing(Host, Protocol):
    """A host that can turn a complete barrier into what follows."""

    def closing_unit(
        self, closing: Closing, refused: DispatchConflict | None = None
    ) -> tuple[str, Unit]:
        """Return the barrier's last state ("released" or "failed") and what to record."""
        ...


# -- committing a unit and what follows


def commit(host: Host, unit: Unit, patience: float) -> Committed | None:
    """Commit a unit; None when its primary write was refused (nothing is written then).

    Raises:
        DatabaseUnavailable: out of patience (seconds), nothing committed.
        DatabaseRetryLater: out of patience, it is unknown whether it was committed.
    """
    if isinstance(unit.primary, Outcome) and unit.plain:
        parameters = outcome_parameters(host, unit.primary)
        for statement in outcome_statements(unit.primary):
            rows = host.database.statement(statement, parameters, patience)
            if rows:
                return Committed([rows[0].ready] if rows[0].ready else [])
    else:
        try:
            return host.database.transaction(lambda conn: write(conn, host, unit), patience)
        except Refused:
            pass
    return _settled(host.database, unit, patience) or _unclaimed(host, unit, patience)


def _settled(database: Database, unit: Unit, patience: float) -> Committed | None:
    """Tell a refusal from an own commit whose answer was lost."""
    primary = unit.primary
    assert primary is not None
    parameters = {"id": primary.task_id, "write_token": primary.write_token}
    return Committed() if database.statement(sql.SETTLED, parameters, patience)[0][0] else None


def _unclaimed(host: Host, unit: Unit, patience: float) -> Committed | None:
    """Write the outcome of a task whose row, made by its own claim, a crash of the server took.

    Nobody else has the task then: it had no row before, and rows are purged long after they end.
    """
    primary = unit.primary
    assert primary is not None
    fence = primary.fence
    if fence.token is None or fence.stamp is None or fence.stamp.recorded or fence.attempt != 1:
        return None
    parameters = {"id": primary.task_id, "worker": None}
    if host.database.statement(sql.INSPECT, parameters, patience)[0].state is not None:
        return None
    if isinstance(primary, Outcome):
        primary.fence = Fence(stamp=fence.stamp)
        return commit(host, unit, patience)
    unit.primary = None  # a retry or replacement: its message makes the row anew
    message = unit.message_of(primary.task_id)
    if message is not None:
        message.stamp(Stamp(unit.call_of(primary.task_id), 0, True))
    return commit(host, unit, patience)


def open_chords(host: Releasing, unit: Unit) -> None:
    """Record and publish a canvas with its barriers: the end of a chord call.

    Raises:
        DatabaseUnavailable: PostgreSQL is away; nothing is recorded and nothing is published.
        DispatchUnknown: the answer to COMMIT was lost and PostgreSQL is still away.
        DispatchConflict: an id is in use by another call.
    """
    if not unit.events:
        return
    faults.point("dispatch.captured")
    try:
        committed = commit(host, unit, host.settings.dispatch_timeout)
    except DatabaseRetryLater as error:
        ids = ", ".join(barrier.id for barrier in unit.barriers)
        raise DispatchUnknown(
            f"PostgreSQL did not answer the COMMIT of chord {ids}: look it up when it is back; "
            f"the chord is whole or was never there ({error})"
        ) from error
    faults.point("dispatch.committed")
    assert committed is not None
    outbox.publish(host, unit)
    for barrier_id in committed.ready:
        release(host, barrier_id)


def follow(host: Releasing, unit: Unit, committed: Committed) -> None:
    """Do what a committed outcome leaves to do: publish, release, run inline errbacks."""
    faults.point("finish.committed")
    # The next message of a task that is retried is not told from its former ones by a late mark.
    outbox.publish(host, unit, soon=not isinstance(unit.primary, HandOver))
    for barrier_id in committed.ready:
        release(host, barrier_id)
    for errback in unit.inline:
        errback()


def release(host: Releasing, barrier_id: str) -> bool:
    """Release a complete barrier: record its body (or its failure) once, then publish.

    Nothing is raised where PostgreSQL is away: the reaper takes a ready barrier up.
    """
    patience = host.settings.dispatch_timeout
    try:
        try:
            released = host.database.transaction(partial(_close, host, barrier_id, None), patience)
        except DispatchConflict as refused:
            close = partial(_close, host, barrier_id, refused)
            released = host.database.transaction(close, patience)
    except DatabaseUnavailable as error:
        logger.warning("Chord %s is complete and is released later: %s", barrier_id, error)
        return False
    if released is None:
        return False
    faults.point("release.committed")
    follow(host, *released)
    return True


def _close(
    host: Releasing, barrier_id: str, refused: DispatchConflict | None, connection: Connection
) -> tuple[Unit, Committed] | None:
    """Record what a complete barrier leads to; None where another process is releasing it."""
    statements = host.database.sql
    inline = host.settings.inline_results
    lock = {"id": barrier_id, "few": _FEW, "inline": inline, "expires": host.keep}
    rows, _ = direct.run(connection, statements.plain(sql.BARRIER_LOCK), lock)
    if not rows:
        return None
    row = rows[0]
    pages = partial(_pages, connection, host, row)
    closing = Closing(
        row.id,
        row.call,
        bytes(row.body),
        None if row.structure is None else bytes(row.structure),
        row.size,
        row.members,
        int(row.bytes),
        partial(pages, row.members, sql.BARRIER_MEMBERS),
        partial(pages, row.doubtful, sql.BARRIER_DOUBTFUL),
    )
    state, unit = host.closing_unit(closing, refused)
    committed = write(connection, host, unit)
    if not row.closed or state != "released":
        parameters = {"id": barrier_id, "state": state, "expires": host.keep}
        connection.execute(statements[sql.BARRIER_CLOSE], parameters)
    return unit, committed


def _pages(
    connection: Connection, host: Host, barrier: Any, count: int, statement: str
) -> Iterator[Page]:
    """Read members, *count* in all, page by page, so that no more than a page is held here."""
    if not count:
        return
    if statement == sql.BARRIER_MEMBERS and barrier.ids is not None:
        yield [
            (key, None if value is None else bytes(value))
            for key, value in zip(barrier.ids, barrier.results, strict=True)
        ]
        return
    for start, stop in reference.windows(barrier.size, host.settings.batch_size):
        window = {"id": barrier.id, "start": start, "stop": stop}
        rows = connection.execute(host.database.sql[statement], window)
        yield [(row.id, None if row.result is None else bytes(row.result)) for row in rows]
