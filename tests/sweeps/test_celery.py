"""Sweeps as tasks, beat entries and commands."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.schedules import crontab
from click.testing import CliRunner, Result

from celery_pgbarrier.cli import pgbarrier
from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps import Expire, Purge, Revive, Rule, progress
from tests.sweeps.models import Document, Job, fill_documents, ids


@pytest.fixture
def sweep(app: Celery) -> Purge:
    found = Purge("documents", Document, where=Document.id > 0, batch_size=10)
    found.register(app)
    return found


@pytest.fixture
def command(app: Celery) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        context = SimpleNamespace(app=app)
        return CliRunner().invoke(pgbarrier, ["sweep", *arguments], obj=context)

    return run


# -- the task


def test_the_task_returns_the_counts(app: Celery, engine: sa.Engine, sweep: Purge) -> None:
    fill_documents(engine, 25)
    result = app.tasks["celery_pgbarrier.sweep.documents"].apply(kwargs={"max_batches": 2}).get()
    assert {name: result[name] for name in ("batches", "rows", "failed", "left", "stopped")} == {
        "batches": 2, "rows": 20, "failed": 0, "left": 5, "stopped": "max_batches",
    }  # fmt: skip


def test_the_task_is_a_plain_one_whatever_the_app_has(app: Celery, sweep: Purge) -> None:
    task = app.tasks[sweep.task_name]
    assert not getattr(task, "pgbarrier_claims", False)


def test_a_task_may_have_an_engine_of_its_own(app: Celery, bare_engine: sa.Engine) -> None:
    fill_documents(bare_engine, 5)
    made: list[int] = []

    def make() -> sa.Engine:
        made.append(1)
        return bare_engine

    sweep = Purge("elsewhere", Document, where=Document.id > 0, engine=make)
    task = sweep.register(app)
    assert (task.apply().get()["rows"], task.apply().get()["rows"], made) == (5, 0, [1])


def test_without_an_engine_it_says_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"call run\(engine\)"):
        Purge("documents", Document, where=Document.id > 0).run()
    with pytest.raises(ConfigurationError, match="needs PostgreSQL, not sqlite"):
        Purge("documents", Document, where=sa.true()).run(sa.create_engine("sqlite://"))


def test_two_sweeps_of_a_name_are_refused(app: Celery, sweep: Purge) -> None:
    sweep.register(app)
    with pytest.raises(ConfigurationError, match="two sweeps named 'documents'"):
        Purge("documents", Document, where=sa.true()).register(app)


def test_progress_goes_to_the_state_and_the_log(
    app: Celery,
    engine: sa.Engine,
    sweep: Purge,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(progress, "_STATE_EVERY", 0.0)
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
    caplog.set_level("INFO")
    fill_documents(engine, 25)
    task, states = app.tasks[sweep.task_name], []
    monkeypatch.setattr(
        type(task), "update_state", lambda self, state, meta: states.append((state, meta["rows"]))
    )
    task.push_request(id="one", is_eager=False)
    try:
        task.run()
    finally:
        task.pop_request()
    assert states == [("PROGRESS", 10), ("PROGRESS", 20), ("PROGRESS", 25)]
    assert "Sweep documents goes on: 20 rows in 2 batches" in caplog.text
    assert "Sweep documents: 25 rows in 3 batches" in caplog.text


# -- beat


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (60, {"expires": 60.0}),
        (timedelta(minutes=2), {"expires": 120.0}),
        (crontab(hour=3), {}),
    ],
)
def test_beat_entry(schedule: Any, options: dict[str, Any]) -> None:
    sweep = Purge("documents", Document, where=sa.true())
    assert sweep.beat_entry(schedule, kwargs={"max_seconds": 60}) == {
        "celery_pgbarrier.sweep.documents": {
            "task": "celery_pgbarrier.sweep.documents",
            "schedule": schedule,
            "options": options,
            "kwargs": {"max_seconds": 60},
        }
    }
    entry = sweep.beat_entry(schedule, queue="sweeps", options={"priority": 1})
    (found,) = entry.values()
    assert found["options"] == {**options, "queue": "sweeps", "priority": 1}


# -- the command line


def test_a_dry_run_changes_nothing(
    engine: sa.Engine, sweep: Purge, command: Callable[..., Result]
) -> None:
    fill_documents(engine, 25)
    result = command("documents", "--dry-run")
    assert (result.exit_code, result.output) == (0, "documents: 25 rows match\n")
    assert len(ids(engine)) == 25


def test_a_run_with_a_bar(engine: sa.Engine, sweep: Purge, command: Callable[..., Result]) -> None:
    fill_documents(engine, 25)
    result = command("documents", "--max-batches", "2")
    assert (result.exit_code, len(ids(engine))) == (0, 5)
    assert "documents: 20 rows in 2 batches" in result.output
    assert "5 left, stopped: max_batches" in result.output


def test_failures_are_told_and_are_the_exit_code(
    app: Celery, engine: sa.Engine, command: Callable[..., Result]
) -> None:
    def hook(document: Document) -> None:
        if document.id == 2:
            raise OSError("disk is gone")

    Purge("hooked", Document, where=Document.id > 0, before_delete=hook).register(app)
    fill_documents(engine, 3)
    result = command("hooked")
    assert result.exit_code == 1
    assert "row 2: OSError: disk is gone" in result.output


def test_rules_are_told(app: Celery, engine: sa.Engine, command: Callable[..., Result]) -> None:
    rules = [Rule("old", Job.attempts == 0, {"state": "failed"})]
    Revive("jobs", Job, rules=rules).register(app)
    with engine.begin() as connection:
        connection.execute(sa.insert(Job.__table__), [{"state": "queued"}] * 3)
    assert "old: 3 rows\njobs: 3 rows match" in command("jobs", "--dry-run").output
    assert "  old: 3 rows" in command("jobs").output


def test_the_list(
    app: Celery, engine: sa.Engine, sweep: Purge, command: Callable[..., Result]
) -> None:
    Expire("ageing", Document, where=sa.true(), values={"status": "old"}, enabled=False).register(
        app
    )
    fill_documents(engine, 3)
    command("documents")
    ageing, documents = command("--list").output.splitlines()
    assert ageing == "ageing: Expire of documents, batches of 1000, disabled; no run known"
    assert documents.startswith("documents: Purge of documents, batches of 10; last run ")
    assert documents.endswith(": 3 rows, 0 failed, 0 left")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("documets",), 1, "no sweep 'documets': did you mean 'documents'?"),
        ((), 2, "see them with --list"),
        (("documents", "--batch-size", "0"), 1, "batch_size must be at least 1"),
    ],
)
def test_what_the_command_refuses(
    sweep: Purge, command: Callable[..., Result], arguments: Any, code: int, message: str
) -> None:
    result = command(*arguments)
    assert (result.exit_code, message in result.output) == (code, True)
