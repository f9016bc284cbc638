"""The servers of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from celery_pgbarrier.embedded import EmbeddedPostgres

POSTGRES = "postgresql+psycopg2://postgres@127.0.0.1:5432/postgres"
REDIS = "redis://127.0.0.1:6379/0"
RABBITMQ = "amqp://guest:guest@127.0.0.1:5672//"
DEBIAN = Path("/usr/lib/postgresql")


@dataclass(frozen=True)
class Servers:
    """Their URLs."""

    postgres: str
    redis: str
    rabbitmq: str


def find_servers(stack: ExitStack, environ: Mapping[str, str] = os.environ) -> Servers:
    """The servers that the environment names; ``stack`` stops what was started."""
    postgres = environ.get("PGBARRIER_BENCH_POSTGRES", POSTGRES)
    if postgres == "embedded":
        postgres = stack.enter_context(_own_cluster()).url()
    if postgres.startswith("postgresql://"):
        postgres = postgres.replace("postgresql://", "postgresql+psycopg2://", 1)
    return Servers(
        postgres,
        environ.get("PGBARRIER_BENCH_REDIS", REDIS),
        environ.get("PGBARRIER_BENCH_RABBITMQ", RABBITMQ),
    )


def _own_cluster() -> EmbeddedPostgres:
    """A cluster with PostgreSQL's defaults (fsync on) that counts statements."""
    installed = sorted(DEBIAN.glob("*/bin/postgres"))
    options = {"max_connections": "200", "track_io_timing": "on", "max_wal_size": "4GB"}
    if installed:
        options["shared_preload_libraries"] = "pg_stat_statements"
    return EmbeddedPostgres(options=options, bindir=installed[-1].parent if installed else None)
