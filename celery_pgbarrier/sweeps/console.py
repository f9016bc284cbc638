"""``celery -A proj pgbarrier sweep``: run a sweep here, or list them."""

from __future__ import annotations

import difflib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from celery import Celery
from sqlalchemy.exc import SQLAlchemyError

from celery_pgbarrier.errors import PgBarrierError
from celery_pgbarrier.store import sweeps as store
from celery_pgbarrier.store.sql import Statements
from celery_pgbarrier.sweeps import hosts, progress, registry
from celery_pgbarrier.sweeps.base import Sweep
from celery_pgbarrier.sweeps.counts import Counts, Stop

#: Ends that are as they should be.
_GOOD = {None, Stop.MAX_BATCHES, Stop.MAX_SECONDS}


@click.command()
@click.argument("name", required=False)
@click.option("--dry-run", is_flag=True, help="Change nothing; tell how many rows match.")
@click.option("--list", "listing", is_flag=True, help="List the sweeps and their last runs.")
@click.option("--batch-size", type=int, help="Rows per batch.")
@click.option("--max-batches", type=int, help="Batches per run.")
@click.option("--max-seconds", type=float, help="No batch begins later.")
@click.pass_context
def sweep(
    context: click.Context, /, name: str | None, dry_run: bool, listing: bool, **limits: Any
) -> None:
    """Run the sweep NAME in this process, with a bar.

    Ctrl-C ends it after the batch in hand.  The exit code is 1 where rows failed or another run
    has its turn.
    """
    app: Celery = context.obj.app
    app.loader.import_default_modules()
    try:
        if listing:
            _list(app)
        elif name is None:
            raise click.UsageError("name a sweep, or see them with --list")
        else:
            _run(_find(app, name), app, dry_run, limits)
    except (PgBarrierError, SQLAlchemyError) as error:
        raise click.ClickException(str(error)) from None


def _find(app: Celery, name: str) -> Sweep:
    known = registry.sweeps(app)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1, 0.0)
    hint = f"did you mean {near[0]!r}?" if near else "none is registered with register(app)"
    raise click.ClickException(f"no sweep {name!r}: {hint}")


def _run(found: Sweep, app: Celery, dry_run: bool, limits: dict[str, Any]) -> None:
    expected = found.dry_run(app=app)
    if dry_run:
        for rule, rows in expected.rules.items():
            click.echo(f"{rule}: {rows} rows")
        click.echo(f"{found.name}: {expected.left} rows match")
        return
    given: Any = {key: value for key, value in limits.items() if value is not None}
    with _interrupted() as stop, click.progressbar(length=expected.left, label=found.name) as bar:
        counts = found.run(app=app, stop=stop, report=progress.Bar(bar), **given)
    _tell(found, counts)


def _tell(found: Sweep, counts: Counts) -> None:
    click.echo(f"{found.name}: {counts}")
    for rule, rows in counts.rules.items():
        click.echo(f"  {rule}: {rows} rows")
    for failure in counts.failures:
        key = ", ".join(map(str, failure.key))
        click.echo(f"  row {key}: {failure.error}", err=True)
    if counts.failed or counts.stopped not in _GOOD:
        raise click.exceptions.Exit(1)


@contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Give what tells whether Ctrl-C was pressed; pressed again, it interrupts as ever."""
    asked = threading.Event()

    def handle(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _list(app: Celery) -> None:
    runs = _last_runs(app)
    for name, found in sorted(registry.sweeps(app).items()):
        chosen = found.options(app, {})
        state = "" if chosen.enabled else ", disabled"
        click.echo(
            f"{name}: {type(found).__name__} of {found.target.name}, batches of "
            f"{chosen.batch_size}{state}; {_last(runs.get(name))}"
        )


def _last_runs(app: Celery) -> dict[str, Any]:
    host = hosts.find(app)
    if host is None:
        return {}
    statements = Statements(host.settings.schema)
    return host.database.transaction(lambda connection: store.runs(connection, statements))


def _last(run: Any) -> str:
    if run is None:
        return "no run known"
    if run.running:
        return f"running since {run.started_at:%F %T} on {run.holder}"
    if run.finished_at is None or run.finished_at < run.started_at:
        return f"the run of {run.started_at:%F %T} did not end"
    stopped = f", stopped: {run.stopped}" if run.stopped else ""
    return (
        f"last run {run.finished_at:%F %T}: {run.rows} rows, {run.failed} failed, "
        f"{run.left_over} left{stopped}"
    )
