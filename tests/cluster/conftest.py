"""The clusters of pytest-celery's ``celery_setup``: of local processes, or in Docker.

Each test is run over local processes, and once more in containers where a Docker engine answers.
The containers are ``postgres:17``, ``redis:7``, and what ``docker/worker.Dockerfile`` builds.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestWorker,
    CeleryWorkerCluster,
    RedisTestBroker,
)
from pytest_docker_tools import build, container, fxtr

from celery_pgbarrier.embedded import EmbeddedBroker, EmbeddedPostgres
from tests.cluster import vendors
from tests.cluster.local import LocalPostgres, LocalRedis, LocalWorker
from tests.support.brokers import private_broker
from tests.support.tables import close_pools
from tests.support.workers import ROOT, WorkerProcess

WORKERS = 2


_missing = vendors.no_engine()


@pytest.fixture(
    params=[
        "local",
        pytest.param("docker", marks=pytest.mark.skipif(bool(_missing), reason=_missing)),
    ]
)
def engine(request: pytest.FixtureRequest) -> str:
    """What the clusters are made of."""
    return str(request.param)


@pytest.fixture
def celery_setup_cls() -> type[vendors.BarrierTestSetup]:
    return vendors.BarrierTestSetup


@pytest.fixture(autouse=True)
def no_connections_left() -> Iterator[None]:
    yield
    close_pools()


# -- clusters


@pytest.fixture
def celery_backend_cluster(engine: str, request: pytest.FixtureRequest) -> CeleryBackendCluster:
    """One PostgreSQL server."""
    if engine == "docker":
        place: Any = request.getfixturevalue("postgres_container")
    else:
        server: EmbeddedPostgres = request.getfixturevalue("own_postgres")
        place = LocalPostgres("postgres", server)
    return CeleryBackendCluster(vendors.BarrierTestBackend(place))


@pytest.fixture
def celery_broker_cluster(engine: str, request: pytest.FixtureRequest) -> CeleryBrokerCluster:
    """One Redis server that keeps nothing on disk."""
    if engine == "docker":
        place: Any = request.getfixturevalue("redis_container")
    else:
        server: EmbeddedBroker = request.getfixturevalue("own_redis")
        place = LocalRedis("redis", server)
    return CeleryBrokerCluster(RedisTestBroker(place))


@pytest.fixture
def celery_worker_cluster(
    engine: str, request: pytest.FixtureRequest, celery_setup_app: Celery
) -> Iterator[CeleryWorkerCluster]:
    """Two workers."""
    if engine == "docker":
        places = [request.getfixturevalue(f"worker_container_{n}") for n in range(WORKERS)]
    else:
        places = request.getfixturevalue("local_workers")
    nodes = [CeleryTestWorker(place, celery_setup_app) for place in places]
    yield CeleryWorkerCluster(*nodes)
    for node in nodes:
        node.teardown()


@pytest.fixture
def local_workers(celery_setup_app: Celery, tmp_path: Path) -> list[LocalWorker]:
    broker = private_broker(celery_setup_app.conf.broker_url)
    workers = [
        WorkerProcess(
            broker, celery_setup_app.conf.result_backend, tmp_path / f"worker-{n}.log",
            settings=vendors.SETTINGS,
        )
        for n in range(WORKERS)
    ]  # fmt: skip
    for worker in workers:
        worker.start()
    return [LocalWorker(worker.hostname, worker) for worker in workers]


# -- containers


def free_port() -> int:
    """A port of this machine: one that is mapped by Docker is another after each restart."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def postgres_ports() -> dict[str, Any]:
    return {"5432/tcp": ("127.0.0.1", free_port())}


@pytest.fixture
def redis_ports() -> dict[str, Any]:
    return {"6379/tcp": ("127.0.0.1", free_port())}


@pytest.fixture(scope="session")
def worker_context(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What ``docker/worker.Dockerfile`` is built from: of a checkout, what it copies."""
    context = tmp_path_factory.mktemp("worker-image")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "tests/__init__.py"):
        (context / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, context / name)
    for name in ("celery_pgbarrier", "tests/support", "docker"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, context / name, ignore=ignored)
    return str(context)


@pytest.fixture
def worker_env(celery_worker_cluster_config: dict[str, Any]) -> dict[str, str]:
    return vendors.BarrierWorkerContainer.initial_env(celery_worker_cluster_config)


worker_image = build(
    path="{worker_context}", dockerfile="docker/worker.Dockerfile", tag="celery-pgbarrier-tests"
)

postgres_container = container(
    image=vendors.POSTGRES_IMAGE,
    ports=fxtr("postgres_ports"),
    environment={"POSTGRES_PASSWORD": vendors.PASSWORD},
    network="{default_pytest_celery_network.name}",
    wrapper_class=vendors.PostgresContainer,
    timeout=60,
)

redis_container = container(
    image=vendors.REDIS_IMAGE,
    ports=fxtr("redis_ports"),
    command=["redis-server", "--save", "", "--appendonly", "no", "--protected-mode", "no"],
    network="{default_pytest_celery_network.name}",
    wrapper_class=vendors.MappedRedisContainer,
    timeout=60,
)


def _worker() -> Any:
    return container(
        image="{worker_image.id}",
        environment=fxtr("worker_env"),
        command=vendors.BarrierWorkerContainer.command(),
        network="{default_pytest_celery_network.name}",
        wrapper_class=vendors.BarrierWorkerContainer,
        timeout=60,
    )


worker_container_0 = _worker()
worker_container_1 = _worker()
