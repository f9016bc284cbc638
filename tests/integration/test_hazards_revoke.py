"""Hazard 15: revoked and expired tasks fail their chord; copies of them revoke nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.worker import state

from celery_pgbarrier.backend import BarrierBackend
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import (
    add,
    hooked,
    identity,
    noted_error,
    notes,
    replaced,
    xsum,
)

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]
MakeWorker = Callable[..., InlineWorker]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


HEADS: dict[str, Callable[..., Any]] = {
    "a task": lambda **options: add.s(1, 1).set(**options),
    "the head of a chain": lambda **options: chain(add.s(1, 1).set(**options), add.s(1)),
    "the head of a long chain": lambda **options: chain(
        add.s(1, 1).set(**options), add.s(1), add.s(1), add.s(1)
    ),
    "the head of a chain that ends in a chord": lambda **options: chain(
        add.s(1, 1).set(**options), chord([add.s(1), add.s(2)], xsum.s())
    ),
    "the head of a chain that ends in a group": lambda **options: chain(
        add.s(1, 1).set(**options), group(add.s(1), add.s(2))
    ),
}


@pytest.mark.parametrize("how", ["revoked", "expired", "revoked by remote control"])
@pytest.mark.parametrize("name", HEADS)
def test_hazard_15_revoke_and_expiry_fail_the_chord(
    backend: BarrierBackend, worker: InlineWorker, tables: Tables, tmp_path: Path, name: str,
    how: str,
) -> None:  # fmt: skip
    """The remote control marks the task in the backend at once, and knows nothing but its id."""
    path = str(tmp_path / "errors")
    past = datetime.now(timezone.utc) - timedelta(minutes=1)
    head = HEADS[name](**({"expires": past} if how == "expired" else {"task_id": "revoked-one"}))
    body = xsum.s().set(link_error=[noted_error.s(path)])
    result = chord([head, add.s(5, 5)], body).delay()
    if how != "expired":
        state.revoked.add("revoked-one")
    if how == "revoked by remote control":
        backend.mark_as_revoked("revoked-one", reason="revoked", store_result=True)
    worker.drain()
    assert tables.barrier_states().count("failed") == len(tables.barrier_states())
    assert result.state == "FAILURE"
    assert "TaskRevokedError" in str(result.result)
    assert notes(path) == [result.id]
    assert tables.count("task", "state <> 'done'") == 0


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_hazard_15_a_duplicate_does_not_revoke_a_running_task(
    make_worker: MakeWorker, tables: Tables, hook: Hook, how: str
) -> None:
    first, second = make_worker("first"), make_worker("second")
    seen: list[tuple[str, str]] = []

    @hook("running")
    def running(task: Any, value: Any) -> None:
        duplicate = second.request(original.message)
        if how == "expired":
            duplicate._expires = duplicate.expires
            duplicate.expires = datetime.now(timezone.utc) - timedelta(minutes=1)
        else:
            state.revoked.add(task.request.id)
        assert duplicate.revoked()
        row = tables.task(task.request.id)
        seen.append((row.state, row.status))

    result = chord([hooked.s(7, "running")], xsum.s()).delay()
    original = first.take()
    first.run(original)
    state.revoked.clear()
    first.drain()
    assert seen == [("running", "PENDING")]
    assert result.get(timeout=5) == 7


def test_hazard_15_a_duplicate_does_not_revoke_a_finished_task(
    worker: InlineWorker, tables: Tables
) -> None:
    result = add.delay(1, 1)
    original = worker.take()
    worker.run(original)
    state.revoked.add(result.id)
    assert worker.request(original.message).revoked()
    assert (result.state, result.result) == ("SUCCESS", 2)


@pytest.mark.parametrize("member", [False, True], ids=["task", "member"])
def test_hazard_15_an_old_copy_does_not_revoke_what_was_replaced(
    worker: InlineWorker, tables: Tables, tmp_path: Path, member: bool
) -> None:
    task = replaced.s(add.s(20, 20) | add.s(2))
    result = chord([task], xsum.s()).delay() if member else task.delay()
    original = worker.take()
    worker.run(original)
    old = worker.request(original.message)
    old.expires = datetime.now(timezone.utc) - timedelta(minutes=1)
    assert old.revoked()
    assert tables.task(original.id).state == "expected"
    state.revoked.clear()
    worker.drain()
    assert result.get(timeout=5) == 42


def test_hazard_15_an_old_copy_does_not_revoke_what_waits_for_its_retry(
    worker: InlineWorker, tables: Tables, hook: Hook
) -> None:
    @hook("retry")
    def retry(task: Any, value: Any) -> str:
        if not task.request.retries:
            raise task.retry(countdown=3600)
        return "done"

    result = chord([hooked.s(1, "retry")], identity.s()).delay()
    original = worker.take()
    worker.run(original)
    old = worker.request(original.message)
    old.expires = datetime.now(timezone.utc) - timedelta(minutes=1)
    assert old.revoked()
    assert tables.task(original.id).state == "queued"
    state.revoked.clear()
    worker.drain()
    assert result.get(timeout=5) == ["done"]
