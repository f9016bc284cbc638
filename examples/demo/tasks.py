"""The Celery application: a header task that counts one file, a body that merges the counts."""

from __future__ import annotations

import os

from celery import Celery
from sqlalchemy import create_engine, pool, text

import celery_pgbarrier
from examples.demo.counting import Figures, count_file, merge_figures

app = Celery(
    "demo",
    broker=os.environ["DEMO_BROKER_URL"],
    backend=os.environ["DEMO_BACKEND_URL"],
    task_cls="celery_pgbarrier:BarrierTask",
)
app.conf.update(
    # Seconds instead of the default minutes, so that one can watch the recovery.
    pgbarrier_lease=3,
    pgbarrier_heartbeat=1,
    pgbarrier_reap_interval=1,
    pgbarrier_republish_after=3,
    beat_schedule={**celery_pgbarrier.beat_schedule()},
    broker_connection_retry_on_startup=True,
)


@app.task
def count(path: str) -> Figures:
    return count_file(path)


@app.task
def merge(parts: list[Figures]) -> Figures:
    # A connection of its own, outside every protocol: it tells of each run, wanted or not.
    engine = create_engine(os.environ["DEMO_DATABASE_URL"], poolclass=pool.NullPool)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO demo_body_run DEFAULT VALUES"))
    return merge_figures(parts)
