"""The servers, databases, brokers and worker processes of the tests.

With ``PGBARRIER_TEST_PGBOUNCER=1`` PgBouncer stands between, in transaction mode.
``PGBARRIER_TEST_POSTGRES``, ``PGBARRIER_TEST_REDIS`` and ``PGBARRIER_TEST_RABBITMQ`` name servers;
the first two may say ``embedded``. Without them the default ports of this machine are tried, then
embedded servers started. With ``CI=true`` a server that is missing fails the run.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state

from celery_pgbarrier.embedded import EmbeddedBroker, EmbeddedPostgres
from tests.support import brokers, databases, pgbouncer
from tests.support.brokers import Broker
from tests.support.services import ServiceMissing, Services, find_services
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess, environment

collect_ignore = ["smoke"]  # for the installed wheel, see tests/smoke/run

SERVICES = pytest.StashKey[Services]()
SERVERS = pytest.StashKey[ExitStack]()
LEFT_OUT = pytest.StashKey[int]()
FAILED = pytest.StashKey[bool]()

RABBITMQ_FIXTURES = {"rabbitmq_url", "rabbitmq_broker"}


# -- the session: which servers there are, and what is left out without them


def pytest_sessionstart(session: pytest.Session) -> None:
    """Find the servers, before any other process of the session is started."""
    config = session.config
    if hasattr(config, "workerinput"):
        config.stash[SERVICES] = Services.decode(config.workerinput["pgbarrier"])
        return
    if config.option.collectonly:
        return
    config.stash[SERVERS] = stack = ExitStack()
    try:
        services = find_services(stack)
        databases.sweep(services.postgres)
    except ServiceMissing as error:
        stack.close()
        pytest.exit(f"a service is missing: {error}", returncode=3)
    config.stash[SERVICES] = services


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of xdist what was found."""
    if SERVICES in node.config.stash:
        node.workerinput["pgbarrier"] = node.config.stash[SERVICES].encode()


def pytest_unconfigure(config: pytest.Config) -> None:
    if SERVERS in config.stash:
        config.stash[SERVERS].close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs RabbitMQ or Redis by its fixtures; leave out what cannot run."""
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        if names & RABBITMQ_FIXTURES:
            item.add_marker("rabbitmq")
        if names & {"redis_url", "redis_broker"}:
            item.add_marker("redis")
    services = config.stash.get(SERVICES, None)
    if services is None or services.rabbitmq:
        return
    left_out = [item for item in items if item.get_closest_marker("rabbitmq")]
    items[:] = [item for item in items if not item.get_closest_marker("rabbitmq")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["pgbarrier_left_out"] = config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a process of xdist left out; all of them collect the same."""
    output = getattr(node, "workeroutput", None) or {}
    stash = node.config.stash
    stash[LEFT_OUT] = max(stash.get(LEFT_OUT, 0), output.get("pgbarrier_left_out", 0))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    services = config.stash.get(SERVICES, None)
    if services is None or not services.notes:
        return
    terminalreporter.section("services")
    for note in services.notes:
        terminalreporter.write_line(note)
    if not services.rabbitmq:
        count = config.stash.get(LEFT_OUT, 0)
        terminalreporter.write_line(f"tests left out for want of RabbitMQ: {count}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let fixtures know, when they clean up, whether their test failed."""
    report: Any = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


# -- what no test may leave behind


@pytest.fixture(autouse=True)
def no_leaked_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread running which would keep a process from ending."""
    before = set(threading.enumerate())
    yield

    def left() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in before and not t.daemon]

    if not request.node.stash.get(FAILED, False):
        wait_until(lambda: not left(), 3.0, lambda: f"no thread left behind: {left()}")


# -- PostgreSQL


@pytest.fixture(scope="session")
def services(pytestconfig: pytest.Config) -> Services:
    """The servers of this session."""
    return pytestconfig.stash[SERVICES]


@pytest.fixture(scope="session")
def postgres_server(services: Services) -> str:
    """The URL of a database of the server, for a user who may make others."""
    return services.postgres


@pytest.fixture(scope="session")
def template_database(postgres_server: str) -> str:
    """The name of a database with the present tables and nothing in them."""
    return databases.template(postgres_server)


def _checked_database(request: pytest.FixtureRequest, admin: str, source: str) -> Iterator[str]:
    pooler = request.config.stash[SERVICES].pgbouncer
    with databases.temporary_database(admin, source) as url:
        yield pgbouncer.through(url, pooler)
        if not request.node.stash.get(FAILED, False):
            left = databases.leaks(admin, url)
            assert not left, "left behind in the database of the test:\n" + "\n".join(left)


@pytest.fixture
def database_url(
    request: pytest.FixtureRequest, postgres_server: str, template_database: str
) -> Iterator[str]:
    """The SQLAlchemy URL (psycopg2) of a database of the test's own, with empty tables."""
    yield from _checked_database(request, postgres_server, template_database)


@pytest.fixture
def empty_database_url(request: pytest.FixtureRequest, postgres_server: str) -> Iterator[str]:
    """The same without tables."""
    yield from _checked_database(request, postgres_server, "template0")


@pytest.fixture
def own_postgres() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL server of the test's own, to stop, kill and start."""
    with EmbeddedPostgres() as server:
        yield server


# -- brokers


@pytest.fixture
def redis_broker(services: Services) -> Iterator[Broker]:
    """A corner of the Redis server: a key prefix and a queue of the test's own."""
    with brokers.redis_corner(services.redis) as broker:
        yield broker


@pytest.fixture
def redis_url(redis_broker: Broker) -> str:
    """The URL of the Redis server. Others use it too: take ``redis_broker`` for messages."""
    return redis_broker.url


@pytest.fixture
def own_redis() -> Iterator[EmbeddedBroker]:
    """A Redis server of the test's own, to flush, stop, kill and start."""
    with EmbeddedBroker() as server:
        yield server


@pytest.fixture
def own_broker(own_redis: EmbeddedBroker) -> Broker:
    """``own_redis``, as a broker."""
    return brokers.private_broker(own_redis.url())


@pytest.fixture(scope="session")
def rabbitmq_vhost(services: Services) -> Iterator[str]:
    """The URL of a virtual host of this process's own where that can be had."""
    assert services.rabbitmq, "tests that need RabbitMQ are left out without it"
    with brokers.virtual_host(services.rabbitmq) as url:
        yield url


@pytest.fixture
def rabbitmq_broker(rabbitmq_vhost: str) -> Iterator[Broker]:
    """A queue of the test's own on RabbitMQ."""
    with brokers.rabbitmq_corner(rabbitmq_vhost) as broker:
        yield broker


@pytest.fixture
def rabbitmq_url(rabbitmq_broker: Broker) -> str:
    """The URL of a RabbitMQ virtual host; take ``rabbitmq_broker`` for a queue."""
    return rabbitmq_broker.url


@pytest.fixture(params=["redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def each_broker(request: pytest.FixtureRequest) -> Broker:
    """The test is run on Redis and again on RabbitMQ."""
    broker: Broker = request.getfixturevalue(f"{request.param}_broker")
    return broker


# -- applications and workers


@pytest.fixture
def make_app() -> Iterator[Callable[..., Celery]]:
    """``make_app(broker, backend, **settings)``: an app equal to that of the test's workers.

    It is the current app until the next is made, or the test ends.
    """
    from tests.support.app import create_app

    made: list[Celery] = []
    previous = _state._tls.current_app, _state.default_app

    def make(broker: Broker, backend: str, **settings: Any) -> Celery:
        app = create_app(environment(broker, backend, settings))
        app.set_default()  # for threads, which have no current app of their own
        made.append(app)
        return app

    yield make
    for app in made:
        app.close()
    _state._tls.current_app, _state.default_app = previous


@pytest.fixture
def start_worker(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[..., WorkerProcess]]:
    """``start_worker(broker, backend, **options)``: a ``WorkerProcess`` that is ready.

    All are killed when the test ends; if it failed, the ends of their logs are in its report.
    """
    started: list[WorkerProcess] = []
    numbers = itertools.count(1)

    def start(broker: Broker, backend: str, *, ready: bool = True, **options: Any) -> WorkerProcess:
        worker = WorkerProcess(broker, backend, tmp_path / f"worker-{next(numbers)}.log", **options)
        started.append(worker)
        worker.start()
        if ready:
            worker.wait_ready()
        return worker

    yield start
    for worker in started:
        worker.kill()
        if request.node.stash.get(FAILED, False):
            request.node.add_report_section("teardown", worker.log_path.name, worker.tail())
