"""Barriers that cannot complete: a count that is wrong, members that nothing touches any more."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection

from celery_pgbarrier.store import sql
from celery_pgbarrier.unit import Host

logger = logging.getLogger(__name__)

#: Barriers that one pass looks at.
_MOST_BARRIERS = 100


@dataclass
class Mended:
    """What a look at the waiting barriers mended."""

    barriers_recounted: int = 0
    members_revived: int = 0


def check(host: Host) -> Mended:
    """Compare the waiting barriers' counts with their rows, and mend what differs.

    A barrier is looked at once in ``pgbarrier_republish_after`` at most, by one statement that
    takes no lock; only one whose count is wrong is locked.  What is recounted to nothing becomes
    ready: it is released in this pass, or fails where rows of its members are gone.

    Raises:
        DatabaseUnavailable: PostgreSQL is away.
    """
    mended = Mended()
    parameters = {"after": host.settings.republish_after, "limit": _MOST_BARRIERS}
    for row in host.database.statement(sql.BARRIERS_UNCHECKED, parameters):
        try:
            _check(host, row.id, mended)
        except Exception:
            logger.exception("Chord %s is checked in a later pass", row.id)
    return mended


def _check(host: Host, barrier_id: str, mended: Mended) -> None:
    barrier = {"id": barrier_id}
    revived = host.database.count(sql.MEMBERS_REVIVE, barrier)
    if revived:
        logger.warning("%s members of chord %s were stranded, they run again", revived, barrier_id)
        mended.members_revived += revived
    seen = host.database.statement(sql.BARRIER_MISCOUNTED, barrier)
    if seen and seen[0].wrong and host.database.transaction(partial(_recount, host, barrier_id)):
        mended.barriers_recounted += 1


def _recount(host: Host, barrier_id: str, connection: Connection) -> bool:
    statements, barrier = host.database.sql, {"id": barrier_id}
    connection.execute(statements[sql.SLOTS_LOCK], barrier)
    row = connection.execute(statements[sql.BARRIER_LOCK_WAITING], barrier).first()
    if row is None:
        return False
    connection.execute(statements[sql.SLOTS_RECOUNT], barrier)
    connection.execute(statements[sql.BARRIER_RECOUNT], barrier)
    logger.warning(
        "The count of chord %s was wrong and is taken from its %s rows (it had %s members)",
        barrier_id, row.members, row.size,
    )  # fmt: skip
    return True
