"""The application: broker and backend come from the environment."""

from __future__ import annotations

import os

from celery import Celery

import celery_pgbarrier

app = Celery(
    "proj",
    broker=os.environ["BROKER"],
    backend=os.environ["BACKEND"],
    task_cls="celery_pgbarrier:BarrierTask",
    include=["proj.tasks"],
)
app.conf.update(
    beat_schedule=celery_pgbarrier.beat_schedule(),
    broker_connection_retry_on_startup=True,
    pgbarrier_auto_migrate=False,  # the migrate service does it
    # Shorter than the defaults, for who kills and flushes and does not care to wait for minutes.
    pgbarrier_lease=15,
    pgbarrier_heartbeat=5,
    pgbarrier_reap_interval=5,
    pgbarrier_republish_after=20,
)
