"""The tasks of the campaign: a member, a body, an errback; each leaves its traces in the ledger."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from typing import Any

from celery import Task, shared_task
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from celery_pgbarrier import faults
from celery_pgbarrier.errors import DatabaseUnavailable
from tests.chaos import ledger

MEMBER, BODY, ERRBACK = "chaos.member", "chaos.body", "chaos.errback"

#: How long an armed member waits for the others, so that it is the last, seconds.
LAST = 3.0


def effect(task: Task, label: str, kind: str, position: int, value: int) -> None:
    """Apply an effect in the database; tried again while that is away."""
    values = {"label": label, "kind": kind, "position": position, "value": value}
    apply = _apply_once if hasattr(task, "transaction") else _apply
    ledger.patiently(lambda: apply(task, values), (DBAPIError, DatabaseUnavailable))


def _apply_once(task: Any, values: dict[str, Any]) -> None:
    with task.transaction("effect") as tx:
        tx.session.execute(text(ledger.EFFECT), values)


def _apply(task: Task, values: dict[str, Any]) -> None:
    engine = create_engine(os.environ[ledger.DATABASE], poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text(ledger.EFFECT), values)
        faults.point("effect.committing")
    faults.point("effect.committed")


@shared_task(name=MEMBER, bind=True)
def member(
    self: Task,
    label: str,
    position: int,
    value: int,
    seconds: float = 0.0,
    others: int = 0,
    ends: str = "",
    ticket: dict[str, Any] | None = None,
) -> int:
    """Return ``value``.

    :param seconds: how long it takes.
    :param others: it ends after so many others of its chord, as far as these end in time.
    :param ends: ``fail`` raises, ``die`` kills its process at each run.
    :param ticket: what is to happen to the process that runs it.
    """
    ledger.note(self.request.id, "start", label, "member", position)
    pause = threading.Event()
    pause.wait(seconds)
    for _ in range(int(LAST / 0.1) if others else 0):
        if ledger.stored(label) >= others:
            break
        pause.wait(0.1)
    if ends == "fail":
        raise ValueError("as told")
    if ends == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    effect(self, label, "member", position, value)
    ledger.note(self.request.id, "end", label, "member", position)
    return value


@shared_task(name=BODY, bind=True)
def body(
    self: Task, values: Iterable[int], label: str, ticket: dict[str, Any] | None = None
) -> int:
    """Sum up what the members returned."""
    ledger.note(self.request.id, "start", label, "body")
    total = sum(values)
    effect(self, label, "body", 0, total)
    ledger.note(self.request.id, "end", label, "body")
    return total


@shared_task(name=ERRBACK, bind=True)
def errback(self: Task, request_id: str, label: str) -> None:
    """Note that the chord failed."""
    ledger.note(self.request.id, "start", label, "errback")
    effect(self, label, "errback", 0, 0)
