"""The servers that a test session uses: given by the environment, found, or embedded.

One process, the controller under xdist, decides this once; the others are told its answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import psycopg2
import redis
from kombu import Connection
from sqlalchemy import make_url

from celery_pgbarrier.embedded import EmbeddedBroker, EmbeddedPostgres, EmbeddedServerError
from tests.support import pgbouncer

EMBEDDED = "embedded"
#: Set to 1, the databases of tests are reached through PgBouncer.
PGBOUNCER = "PGBARRIER_TEST_PGBOUNCER"
CONNECT_SECONDS = 3


class ServiceMissing(Exception):
    """A server was asked for, by its URL or by CI=true, and does not answer."""


@dataclass(frozen=True)
class Services:
    """The URLs of the servers; no RabbitMQ where none was reached.

    ``pgbouncer`` is the ``host:port`` of the pooler that tests go through, if they do.
    """

    postgres: str
    redis: str
    rabbitmq: str | None
    pgbouncer: str | None = None
    notes: tuple[str, ...] = ()

    def encode(self) -> dict[str, object]:
        """What xdist can send to another process."""
        return {**asdict(self), "notes": list(self.notes)}

    @classmethod
    def decode(cls, values: Mapping[str, object]) -> Services:
        return cls(**{**values, "notes": tuple(values["notes"])})  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Kind:
    name: str
    variable: str
    default: str
    probe: Callable[[str], None]
    embed: Callable[[ExitStack], str] | None

    def find(self, environ: Mapping[str, str], stack: ExitStack) -> tuple[str | None, str | None]:
        """The URL, and a note for the reader where it is not a server of the machine."""
        given = environ.get(self.variable)
        if given == EMBEDDED and self.embed:
            return self.embed(stack), f"{self.name}: an embedded server, as {self.variable} says"
        url = given or self.default
        try:
            self.probe(url)
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            why = f"{self.name} does not answer at {_without_password(url)} ({reason})"
        else:
            return url, None
        if given or environ.get("CI") == "true":
            raise ServiceMissing(f"{why}: start it, or set {self.variable} to where it is")
        if self.embed is None:
            return None, f"{why}: its tests were left out"
        try:
            return self.embed(stack), f"{why}: an embedded server stood in"
        except EmbeddedServerError as error:
            raise ServiceMissing(f"{why}, and no embedded one can stand in: {error}") from error


def _without_password(url: str) -> str:
    parts, _, place = url.rpartition("@")
    return f"{parts.rpartition(':')[0]}:***@{place}" if parts.count(":") > 1 else url


def libpq_url(url: str) -> str:
    """An SQLAlchemy URL as psycopg2 takes it: without the driver's name."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _probe_postgres(url: str) -> None:
    psycopg2.connect(libpq_url(url), connect_timeout=CONNECT_SECONDS).close()


def _probe_redis(url: str) -> None:
    with redis.Redis.from_url(url, socket_connect_timeout=CONNECT_SECONDS) as client:
        client.ping()


def _probe_rabbitmq(url: str) -> None:
    with Connection(url, connect_timeout=CONNECT_SECONDS) as connection:
        connection.connect()


def _embed_postgres(stack: ExitStack) -> str:
    # Nothing of a test session need survive a crash of the machine.
    options = {"fsync": "off", "max_connections": "200"}
    return stack.enter_context(EmbeddedPostgres(options=options)).url()


def _embed_redis(stack: ExitStack) -> str:
    return stack.enter_context(EmbeddedBroker()).url()


POSTGRES = _Kind(
    "PostgreSQL",
    "PGBARRIER_TEST_POSTGRES",
    "postgresql+psycopg2://postgres@127.0.0.1:5432/postgres",
    _probe_postgres,
    _embed_postgres,
)
REDIS = _Kind(
    "Redis", "PGBARRIER_TEST_REDIS", "redis://127.0.0.1:6379/0", _probe_redis, _embed_redis
)
RABBITMQ = _Kind(
    "RabbitMQ",
    "PGBARRIER_TEST_RABBITMQ",
    "amqp://guest:guest@127.0.0.1:5672//",
    _probe_rabbitmq,
    None,
)


def find_services(stack: ExitStack, environ: Mapping[str, str] = os.environ) -> Services:
    """Find or start every server; ``stack`` stops what was started.

    Raises:
        ServiceMissing: one that was asked for does not answer, or none can stand in.
    """
    found = [kind.find(environ, stack) for kind in (POSTGRES, REDIS, RABBITMQ)]
    urls = [url for url, _ in found]
    notes = tuple(note for _, note in found if note)
    pooler = None
    if environ.get(PGBOUNCER) == "1":
        program = pgbouncer.find()
        if program is None:
            raise ServiceMissing(
                f"{PGBOUNCER}=1 and no pgbouncer is installed: install its package"
            )
        pooler = stack.enter_context(pgbouncer.running(program, str(urls[0])))
        notes += (f"PgBouncer stood between the tests and PostgreSQL, as {PGBOUNCER} says",)
    return Services(*urls, pgbouncer=pooler, notes=notes)  # type: ignore[arg-type]
