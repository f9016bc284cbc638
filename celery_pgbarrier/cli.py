"""``celery -A proj pgbarrier ...``."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

import click

from celery_pgbarrier import reaper
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
@click.pass_context
def migrate(context: click.Context, sql: bool) -> None:
    """Make or upgrade the tables."""
    backend = _backend(context)
    name = backend.settings.schema
    if sql:
        click.echo(schema.script(name))
        return
    try:
        backend.database.transaction(
            lambda connection: schema.upgrade(connection, name), check=False
        )
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


def _line(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
