"""The Celery application of the campaign's processes, configured by environment variables."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery
from celery.signals import task_postrun, task_prerun, worker_process_init

from celery_pgbarrier import faults
from tests.chaos import peers, tickets


def create_app() -> Celery:
    """An application on any of the backends; with ours, its tasks are ``BarrierTask``."""
    backend = os.environ["PGBARRIER_TEST_BACKEND"]
    ours = backend.startswith("pgbarrier")
    app = Celery(
        "chaos",
        broker=os.environ["PGBARRIER_TEST_BROKER"],
        backend=backend,
        task_cls="celery_pgbarrier:BarrierTask" if ours else None,
        include=["tests.chaos.tasks"],
    )
    app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)
    app.conf.update(json.loads(os.environ["PGBARRIER_TEST_CONF"]))
    if not ours:
        peers.install(app)
    return app


def _carried(task: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """The ticket of a task, or of the body that Celery's ``chord_unlock`` is to send."""
    if task.name == "celery.chord_unlock":
        kwargs = args[1].get("kwargs", {})
    ticket: dict[str, Any] | None = kwargs.get("ticket")
    return ticket


@task_prerun.connect(weak=False)
def _arm(task: Any = None, args: Any = (), kwargs: Any = None, **_: Any) -> None:
    tickets.arm(_carried(task, args, kwargs))
    if not hasattr(task, "pgbarrier_claims"):
        faults.point("claim.granted")


@task_postrun.connect(weak=False)
def _disarm(task: Any = None, args: Any = (), kwargs: Any = None, **_: Any) -> None:
    tickets.disarm(_carried(task, args, kwargs))


PROCESS_TICKETS = json.loads(os.environ.get(tickets.VARIABLE, "[]"))
for own in PROCESS_TICKETS:
    tickets.arm(own)


@worker_process_init.connect(weak=False)
def _leave_to_parent(**_: Any) -> None:
    """Pool processes carry those tickets only that are meant for them."""
    for ticket in PROCESS_TICKETS:
        if ticket["victim"] != "child":
            tickets.disarm(ticket)


app = create_app()
