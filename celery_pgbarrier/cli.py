"""``celery -A proj pgbarrier ...``."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

import click
from sqlalchemy import Connection

from celery_pgbarrier import poison, reaper
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.errors import PgBarrierError
from celery_pgbarrier.store import schema
from celery_pgbarrier.sweeps.console import sweep


@click.group()
@click.pass_context
def pgbarrier(context: click.Context) -> None:
    """Durable chords on PostgreSQL: tables, reaper, sweeps."""


pgbarrier.add_command(sweep)


def _backend(context: click.Context) -> BarrierBackend:
    try:
        backend = context.obj.app.backend
    except PgBarrierError as error:
        raise click.ClickException(str(error)) from None
    if not isinstance(backend, BarrierBackend):
        raise click.ClickException(
            "this app's result_backend is not pgbarrier: set it to "
            "pgbarrier://user:password@host:port/database"
        )
    return backend


@pgbarrier.command()
@click.option("--sql", is_flag=True, help="Print the DDL for a DBA; touch nothing.")
@click.option(
    "--from", "since", metavar="VERSION", help="With --sql: the version that the tables are at."
)
@click.pass_context
def migrate(context: click.Context, sql: bool, since: str | None) -> None:
    """Make or upgrade the tables."""
    backend = _backend(context)
    name = backend.settings.schema
    if sql:
        try:
            click.echo(schema.script(name, since))
        except PgBarrierError as error:
            raise click.ClickException(str(error)) from None
        return

    def work(connection: Connection) -> None:
        schema.upgrade(connection, name)
        schema.require(connection, name)

    try:
        backend.database.transaction(work, check=False)
    except PgBarrierError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"pgbarrier tables are at version {schema.head()}")


@pgbarrier.command()
@click.option("--once", is_flag=True, help="Do one pass and end.")
@click.pass_context
def reap(context: click.Context, once: bool) -> None:
    """Find orphans and put them back to work, every pgbarrier_reap_interval seconds."""
    backend = _backend(context)
    pause = threading.Event()
    while True:
        try:
            click.echo(_line(asdict(reaper.run_once(backend))))
        except PgBarrierError as error:
            if once:
                raise click.ClickException(str(error)) from None
            click.echo(f"pass missed: {error}", err=True)
        if once or pause.wait(backend.settings.reap_interval):
            return


@pgbarrier.group("poison")
def poison_group() -> None:
    """Tasks that are not run any more: they killed their process too often, or cannot be read."""


@poison_group.command("list")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="At most so many, the latest first.",
)
@click.pass_context
def poison_list(context: click.Context, limit: int) -> None:
    """Show them, a line each: id, name, crashes, when, the state of its chord, why."""
    backend = _backend(context)
    try:
        rows = poison.listed(backend, limit)
    except PgBarrierError as error:
        raise click.ClickException(str(error)) from None
    for row in rows:
        chord = f"chord {row.barrier_state or 'gone'}" if row.barrier_id else "no chord"
        when = row.poisoned_at.isoformat(timespec="seconds")
        click.echo(f"{row.id}  {row.name}  crashes {row.crashes}  {when}  {chord}  {row.reason}")


@poison_group.command("retry")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.pass_context
def poison_retry(context: click.Context, ids: tuple[str, ...]) -> None:
    """Run tasks again under their ids, their crashes forgotten.

    A chord that still waits for other members counts the task again. One that has failed stays
    failed; the task then runs by itself, with its links and the rest of its chain.
    """
    backend = _backend(context)
    refused = 0
    for task_id in ids:
        try:
            done = poison.retry(backend, task_id)
        except PgBarrierError as error:
            refused += 1
            click.echo(f"{task_id}: {error}", err=True)
        else:
            chord = "its chord waits for it" if done.rejoined else "it counts for no chord"
            click.echo(f"{task_id}: put back, {chord}")
    if refused:
        raise click.ClickException(f"{refused} of {len(ids)} not put back")


def _line(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
