"""The machine and the servers that a run was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import celery
import psutil
import redis
from sqlalchemy import Connection, text

from tests.support.databases import autocommit

_SETTINGS = (
    "server_version", "fsync", "synchronous_commit", "wal_sync_method", "full_page_writes",
    "shared_buffers", "max_wal_size", "max_connections", "shared_preload_libraries",
)  # fmt: skip


def describe(postgres: str, redis_url: str) -> dict[str, str]:
    """What a reader needs to judge the figures."""
    with autocommit(postgres) as connection:
        server = _postgres(connection)
    with redis.Redis.from_url(redis_url) as client:
        about = client.info("server")
    return {
        "processor": f"{os.cpu_count()} of {_processor()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        "load before": " ".join(f"{each:.2f}" for each in os.getloadavg()),
        "python": platform.python_version(),
        "celery": celery.__version__,
        "redis": str(about["redis_version"]),
        "postgresql": server,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _postgres(connection: Connection) -> str:
    query = text("SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY(:names)")
    found = dict(connection.execute(query, {"names": list(_SETTINGS)}).tuples().all())
    return ", ".join(f"{name} {found[name] or 'none'}" for name in _SETTINGS if name in found)


def load() -> float:
    """How busy the machine is now: the share of its processors, over half a second."""
    return psutil.cpu_percent(0.5)
