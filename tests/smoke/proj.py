"""The application of the smoke test: what a user writes, nothing more."""

from __future__ import annotations

import os

from celery import Celery

app = Celery(
    "proj",
    broker=os.environ["SMOKE_BROKER"],
    backend=os.environ["SMOKE_BACKEND"],
    task_cls="celery_pgbarrier:BarrierTask",
)


@app.task
def double(number: int) -> int:
    return 2 * number


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)
