"""Recorded messages that nobody has claimed: published, probed for, published again, given up."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Protocol

from sqlalchemy import Connection, Row

from celery_pgbarrier import faults, queues
from celery_pgbarrier.dispatch import publish
from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.errors import MessageRefused, NeverClaimed, PgBarrierError
from celery_pgbarrier.store import sql
from celery_pgbarrier.unit import Host, Stamp

logger = logging.getLogger(__name__)

#: Batches in one pass; what is left is the next pass's.
_MOST_BATCHES = 100
#: Publications of a message without a claim, after which it is given up once its queue has moved
#: past it again: 8.5 hours at least with the defaults (30 s, doubled ten times).  As many refusals
#: of the broker are enough, without its queue: 4 hours with the defaults (15 s, doubled).
_MOST_PUBLICATIONS = 10
#: How many batches of waiting messages a pass looks through for those of queues that are empty.
_SCAN = 20


class GivingUp(Host, Protocol):
    """A host that can fail a task that nobody has claimed."""

    def fail_unclaimed(self, task_id: str, stamp: Stamp, error: PgBarrierError) -> None:
        """Store *error* as its outcome, unless it has gone on since *stamp*."""
        ...


@dataclass
class Relayed:
    """What a pass did with the messages that were due."""

    published: int = 0
    deferred: int = 0
    given_up: int = 0


# -- overdue messages


@dataclass
class Plan:
    """What to do with messages that are due.

    Ids to publish, a probe by queue, ids to leave, and messages that were taken again and again
    and never led to a claim.
    """

    publish: list[str] = field(default_factory=list)
    probes: dict[str, Row[Any]] = field(default_factory=dict)
    defer: list[str] = field(default_factory=list)
    hopeless: list[Row[Any]] = field(default_factory=list)


def plan(due: Sequence[Row[Any]], moved: dict[str, datetime], probing: set[str]) -> Plan:
    """Decide which messages are lost and which only wait in a long queue.

    A message is lost when it was never published or when its queue has moved past it: a younger
    message was claimed.  Where nothing shows that, the youngest of the queue's messages is sent
    again as a probe: if the queue is a backlog it waits too; if it lost its messages, the probe is
    claimed and shows that all older ones are lost.  What the broker has refused each time is
    hopeless.
    """
    result = Plan()
    for row in due:
        through = moved.get(row.queue)
        if row.published_at is None and row.publications >= _MOST_PUBLICATIONS:
            result.hopeless.append(row)  # refused each time
        elif row.published_at is None:
            result.publish.append(row.id)
        elif through is None or row.published_at > through:
            result.defer.append(row.id)
            best = result.probes.get(row.queue)
            if row.queue not in probing and (best is None or row.published_at > best.published_at):
                result.probes[row.queue] = row
        elif row.publications >= _MOST_PUBLICATIONS:
            result.hopeless.append(row)
        else:
            result.publish.append(row.id)
    chosen = {row.id for row in result.probes.values()}
    result.defer = [task_id for task_id in result.defer if task_id not in chosen]
    return result


def publish_due(host: GivingUp) -> Relayed:
    """Publish what is due and not just waiting in a backlog; give up what never leads to a claim.

    Raises:
        DatabaseUnavailable: PostgreSQL is away.
    """
    done = Relayed()
    for _ in range(_MOST_BATCHES):
        found, taken, decided = host.database.transaction(partial(_take_up, host))
        done.deferred += len(decided.defer)
        done.given_up += sum(_give_up(host, row) for row in decided.hopeless)
        if taken:
            published, away = _publish(host, taken)
            done.published += published
            if away:
                break
        if found < host.settings.batch_size:
            break
    return done


def _take_up(host: Host, connection: Connection) -> tuple[int, list[Row[Any]], Plan]:
    """Decide on one batch of due messages and set their next due times."""
    statements, settings = host.database.sql, host.settings
    due = connection.execute(statements[sql.TASKS_DUE], {"limit": settings.batch_size}).all()
    if not due:
        return 0, [], Plan()
    names = {"queues": sorted({row.queue for row in due})}
    moved: dict[str, datetime] = {}
    for queue, through in connection.execute(statements[sql.QUEUES_MOVED], names):
        if through is not None and (queue not in moved or through > moved[queue]):
            moved[queue] = through
    out = {**names, "after": settings.republish_after}
    probing = set(connection.execute(statements[sql.PROBES_OUT], out).scalars())
    decided = plan(due, moved, probing)
    for queue, row in decided.probes.items():
        probe = {"queue": queue, "id": row.id, "of": row.published_at, "through": moved.get(queue)}
        connection.execute(statements[sql.PROBE_SENT], probe)
    probes = [row.id for row in decided.probes.values()]
    taken = _advance(host, connection, decided.publish + probes, probes)
    later = decided.defer + [row.id for row in decided.hopeless]
    if later:
        parameters = {"ids": later, "after": _look_again(host)}
        connection.execute(statements[sql.TASKS_DEFER], parameters)
    return len(due), taken, decided


def _look_again(host: Host) -> float:
    """Return after how many seconds a message of a backlog is looked at again.

    Each look is an update of its row: a quarter of ``pgbarrier_republish_after`` keeps them few,
    and what a probe shows to be lost is published that much later at most.
    """
    return max(host.settings.reap_interval, host.settings.republish_after / 4)


def _advance(
    host: Host, connection: Connection, ids: list[str], probes: Sequence[str] = ()
) -> list[Row[Any]]:
    if not ids:
        return []
    advance = {"ids": ids, "probes": list(probes), "after": host.settings.republish_after}
    advanced = connection.execute(host.database.sql[sql.TASKS_ADVANCE], advance)
    return sorted(advanced, key=lambda row: int(row.place))


def _publish(host: Host, taken: Sequence[Row[Any]]) -> tuple[int, bool]:
    """Publish messages that were taken up; those that the broker does not take are due again.

    Returns how many it took, and whether it is away.
    """
    faults.point("reap.advanced")
    refused: dict[str, Exception] = {}
    envelopes = list(_envelopes(taken))
    published = set(publish(host.app, envelopes, refused))
    missed = [key for key, _ in envelopes if key not in published and key not in refused]
    after = host.settings.reap_interval
    for statement, ids in ((sql.TASKS_REFUSED, [*refused]), (sql.TASKS_UNPUBLISHED, missed)):
        if ids:
            host.database.count(statement, {"ids": ids, "after": after})
    return len(published), bool(missed)


def _envelopes(taken: Sequence[Row[Any]]) -> Iterator[tuple[str, Envelope]]:
    """Yield the messages of rows; one that cannot be read does not stop the others."""
    for row in taken:
        try:
            yield row.id, Envelope.decode(row.message).copied(row.copies)
        except Exception as error:
            logger.error("The recorded message of task %s cannot be read: %r", row.id, error)


def _give_up(host: GivingUp, row: Row[Any]) -> bool:
    error: PgBarrierError
    if row.published_at is None:
        error = MessageRefused(
            f"the broker refused the message of {row.name} {row.publications} times: the log of "
            "whoever publishes has its reasons (a message that is too large, an impossible option)"
        )
    else:
        error = NeverClaimed(
            f"the message of {row.name} was published {row.publications + 1} times; younger ones "
            f"of queue {row.queue} were run, it never was: can its workers read it?"
        )
    try:
        host.fail_unclaimed(row.id, Stamp(row.call, row.seq, True), error)
    except Exception:
        logger.exception("Task %s is given up in a later pass", row.id)
        return False
    return True


# -- producers that died


def publish_interrupted(host: Host) -> int:
    """Publish members whose producer did not say that it has published them; return how many.

    Those that a worker has claimed are not touched; copies of others are dropped at their claim.

    Raises:
        DatabaseUnavailable: PostgreSQL is away.
    """
    published = 0
    for _ in range(_MOST_BATCHES):
        taken = host.database.transaction(partial(_take_unconfirmed, host))
        if taken is None:
            break
        sent, away = _publish(host, taken)
        published += sent
        if away:  # they are due again, one by one
            break
    return published


def _take_unconfirmed(host: Host, connection: Connection) -> list[Row[Any]] | None:
    """Take up the messages of one barrier (a batch at most); None where no barrier is due."""
    barrier_id = connection.execute(host.database.sql[sql.DISPATCH_DUE]).scalar()
    if barrier_id is None:
        return None
    found = connection.execute(host.database.sql[sql.MESSAGES_UNCONFIRMED], {"id": barrier_id})
    return _advance(host, connection, list(found.scalars()))


# -- queues that are empty


def publish_lost(host: Host) -> int:
    """Publish again what was sent into queues that are empty or gone by now; return how many.

    What a worker holds, or an ETA keeps away from the queue, is not in it and is not lost: workers
    tell of the former (:data:`~celery_pgbarrier.store.sql.MESSAGES_HELD`), the latter is due from
    its ETA on.

    Raises:
        DatabaseUnavailable: PostgreSQL is away.
    """
    settings = host.settings
    scan: dict[str, Any] = {
        "after": settings.republish_after,
        "early": min(settings.empty_after, settings.republish_after),
        "scan": settings.batch_size * _SCAN,
    }
    names = [row.queue for row in host.database.statement(sql.QUEUES_OUT, scan)]
    gone = sorted(queues.empty(host.app, sorted(names))) if names else []
    published = 0
    for _ in range(_SCAN if gone else 0):
        parameters = {**scan, "queues": gone, "limit": settings.batch_size}
        taken = host.database.transaction(partial(_take_lost, host, parameters))
        if not taken:
            break
        logger.warning("%s messages are gone from their queues and are sent again", len(taken))
        sent, away = _publish(host, taken)
        published += sent
        if away:
            break
    return published


def _take_lost(host: Host, parameters: dict[str, Any], connection: Connection) -> list[Row[Any]]:
    lost = connection.execute(host.database.sql[sql.MESSAGES_LOST], parameters).scalars().all()
    return _advance(host, connection, list(lost))
