"""The vendors of pytest-celery for this package: PostgreSQL, Redis, and a worker, in containers."""

from __future__ import annotations

import json
import os
import socket
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from pytest_celery import (
    CeleryTestBackend,
    CeleryTestContainer,
    CeleryTestSetup,
    CeleryWorkerContainer,
    RedisContainer,
)

from tests.support.app import FAST_RECOVERY, create_app

POSTGRES_IMAGE = "postgres:17"
REDIS_IMAGE = "redis:7"
PASSWORD = "postgres"
QUEUE = "celery"
SETTINGS = {
    **FAST_RECOVERY,
    "imports": ["tests.support.tasks"],
    "broker_connection_retry_on_startup": True,
}


def no_engine() -> str:
    """Why there is no Docker to use; nothing where there is."""
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    url = urlsplit(address)
    local = url.scheme == "unix"
    with socket.socket(socket.AF_UNIX if local else socket.AF_INET) as probe:
        probe.settimeout(5)
        try:
            probe.connect(url.path if local else (url.hostname, url.port or 2375))
        except OSError as error:
            return f"no Docker engine answers at {address} ({error}): containers are left out"
    return ""


def settings(broker: str, backend: str) -> dict[str, str]:
    """The environment that configures ``tests.support.app``."""
    return {
        "PGBARRIER_TEST_BROKER": broker,
        "PGBARRIER_TEST_BACKEND": backend,
        "PGBARRIER_TEST_QUEUE": QUEUE,
        "PGBARRIER_TEST_CONF": json.dumps(SETTINGS),
    }


class Reached:
    """Addresses of a container as its mapped port.

    Inside of a container pytest-docker-tools would take the container's own address and port: on a
    machine that merely looks like a container that is another server altogether.
    """

    internal = ""

    @property
    def port(self) -> int:
        self.reload()  # type: ignore[attr-defined]
        mapped = self.attrs["NetworkSettings"]["Ports"][self.internal]  # type: ignore[attr-defined]
        port = int(mapped[0]["HostPort"])
        assert port != int(self.internal.split("/")[0]), "that is the port of another server"
        return port


class PostgresContainer(Reached, CeleryTestContainer):
    """PostgreSQL, for our backend."""

    internal = "5432/tcp"

    @property
    def celeryconfig(self) -> dict[str, Any]:
        inside = self.attrs["Config"]["Hostname"]
        return {
            "url": self._url(f"{inside}:5432"),
            "host_url": self._url(f"127.0.0.1:{self.port}"),
        }

    def _url(self, address: str) -> str:
        return f"pgbarrier+postgresql+psycopg2://postgres:{PASSWORD}@{address}/postgres"

    @property
    def ready_prompt(self) -> str:
        # The server that sets the database up listens on no address.
        return "listening on IPv4 address"


class BarrierTestBackend(CeleryTestBackend):
    """Our backend, as a node."""


class MappedRedisContainer(Reached, RedisContainer):
    """Redis as a broker."""

    internal = "6379/tcp"

    @property
    def host_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


class BarrierWorkerContainer(CeleryWorkerContainer):
    """A worker with this package and the tests' tasks: ``docker/worker.Dockerfile``."""

    @classmethod
    def command(cls, *args: str, **options: Any) -> list[str]:
        return [
            "celery", "--app=tests.support.app", "worker", "--loglevel=INFO", "--concurrency=2",
            f"--hostname={cls.worker_name()}@%h", f"--queues={QUEUE}", *args,
        ]  # fmt: skip

    @classmethod
    def initial_env(
        cls, celery_worker_cluster_config: dict[str, Any], initial: dict[str, Any] | None = None
    ) -> dict[str, str]:
        brokers = celery_worker_cluster_config["celery_broker_cluster_config"]["urls"]
        backends = celery_worker_cluster_config["celery_backend_cluster_config"]["urls"]
        return {**(initial or {}), **settings(brokers[0], backends[0]), "PYTHONUNBUFFERED": "1"}


class BarrierTestSetup(CeleryTestSetup):
    """A setup whose app is that of its workers."""

    @classmethod
    def create_setup_app(
        cls, celery_setup_config: dict[str, Any], celery_setup_app_name: str
    ) -> Celery:
        app = create_app(
            settings(celery_setup_config["broker_url"], celery_setup_config["result_backend"])
        )
        app.set_default()
        return app
