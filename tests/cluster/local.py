"""Processes of this machine that pytest-celery takes for containers.

Its nodes ask little of a container: where it is, what it says, and to be killed and started again.
"""

from __future__ import annotations

import signal as signals
from typing import Any, Protocol

from celery_pgbarrier.embedded import EmbeddedBroker, EmbeddedPostgres
from tests.support.databases import backend_url
from tests.support.workers import WorkerProcess


class Process(Protocol):
    """What embedded servers and worker processes have in common."""

    @property
    def running(self) -> bool: ...

    def start(self) -> None: ...

    def kill(self) -> None: ...


class LocalContainer:
    """A process, as far as pytest-celery wants to know of a container."""

    def __init__(self, name: str, process: Process) -> None:
        self.name = self.id = name
        self.process = process

    @property
    def celeryconfig(self) -> dict[str, Any]:
        """Where the server is: ``url`` for workers, ``host_url`` for the test."""
        raise NotImplementedError

    @property
    def status(self) -> str:
        return "running" if self.process.running else "exited"

    def ready(self) -> bool:
        return self.process.running

    def kill(self, signal: str | int = "SIGKILL") -> None:
        self.process.kill()

    def restart(self, timeout: float = 60.0) -> None:
        self.process.kill()
        self.process.start()

    def reload(self) -> None:
        """Containers are snapshots; processes are looked at."""

    def teardown(self) -> None:
        self.process.kill()


class LocalPostgres(LocalContainer):
    """An embedded PostgreSQL server."""

    process: EmbeddedPostgres

    @property
    def celeryconfig(self) -> dict[str, Any]:
        url = backend_url(self.process.url())
        return {"url": url, "host_url": url}

    def logs(self) -> str:
        return self.process.log.read_text(errors="replace")


class LocalRedis(LocalContainer):
    """An embedded Redis server."""

    process: EmbeddedBroker

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {"url": self.process.url(), "host_url": self.process.url()}

    def logs(self) -> str:
        return self.process.log.read_text(errors="replace")


class LocalWorker(LocalContainer):
    """A worker process; SIGTERM is a warm shutdown, anything else kills its process group."""

    process: WorkerProcess

    def kill(self, signal: str | int = "SIGKILL") -> None:
        if signal in ("SIGTERM", signals.SIGTERM):
            self.process.stop()
        else:
            self.process.kill()

    def ready(self) -> bool:
        self.process.wait_ready()
        return True

    def logs(self) -> str:
        return self.process.log()
