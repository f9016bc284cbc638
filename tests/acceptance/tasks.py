"""The tasks of these tests. What a body ran to is counted in a table of the test's own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import psycopg2
from celery import Task, shared_task
from sqlalchemy import text

from tests.support.services import libpq_url
from tests.support.tasks import first, note
from tests.support.waiting import wait_until

#: The environment variable that holds the SQLAlchemy URL of the test's database.
DATABASE = "ACCEPTANCE_DATABASE"

BODY = "acceptance.total"


@shared_task(name="acceptance.part")
def part(value: int, seconds: float = 0.0) -> int:
    """A member that takes a while."""
    if seconds:
        threading.Event().wait(seconds)
    return value


@shared_task(name=BODY)
def total(values: Iterable[int], label: str, dies: str | None = None) -> int:
    """A body that leaves a row at each run; with ``dies`` its first run is killed before that."""
    if dies and first(dies):
        os.kill(os.getpid(), signal.SIGKILL)
    result = sum(values)
    with closing(psycopg2.connect(libpq_url(os.environ[DATABASE]))) as connection:
        connection.autocommit = True
        connection.cursor().execute(
            "INSERT INTO body_run (label, total) VALUES (%s, %s)", (label, result)
        )
    return result


@shared_task(name="acceptance.overtaken")
def overtaken(old: int, new: int, path: str, gate: str) -> int:
    """The first run waits for ``gate`` and returns ``old``, any other returns ``new`` at once."""
    if not first(path):
        return new
    wait_until(Path(gate).exists, 120, f"{gate} exists")
    return old


@shared_task(name="acceptance.heard")
def heard(value: int, path: str) -> None:
    """A link: leaves a line of what it was told."""
    note(path, value)


@shared_task(name="acceptance.pay", bind=True)
def pay(self: Task, label: str, told: str, ran: str, gate: str | None = None) -> int:
    """Leave a row, a message and a value, once; the first run waits for ``gate`` in the block."""
    run = 1 if first(ran) else 2
    with self.transaction("pay") as tx:
        if not tx.done:
            insert = text("INSERT INTO body_run (label, total) VALUES (:label, :run)")
            tx.connection.execute(insert, {"label": label, "run": run})
            heard.delay(run, told)
            tx.set(run)
            if gate and run == 1:
                wait_until(Path(gate).exists, 120, f"{gate} exists")
    return tx.value


@shared_task(name="acceptance.deadly")
def deadly(way: str, path: str) -> None:
    """A member that kills what runs it, every time."""
    note(path, os.getpid())
    if way == "exit":
        os._exit(1)
    number = signal.SIGSEGV if way == "segfault" else signal.SIGKILL
    if way == "machine":
        os.killpg(os.getpgid(0), number)
    os.kill(os.getpid(), number)
