"""A database for each test, cloned from one that was migrated once."""

from __future__ import annotations

import datetime
import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.pool import NullPool

import celery_pgbarrier.store
from celery_pgbarrier.store.sql.functions import FUNCTIONS
from tests.support.waiting import wait_until

PREFIX = "pgbarrier"
TEMPLATE_LOCK = 0x706762746D706C  # any number that nobody else uses


def sibling(url: str, database: str, driver: str | None = None) -> str:
    """The URL of another database of the same server, of another driver if one is named."""
    changed = make_url(url).set(database=database)
    if driver:
        changed = changed.set(drivername=f"postgresql+{driver}")
    return changed.render_as_string(hide_password=False)


def with_driver(url: str, driver: str) -> str:
    """The same database through another driver: ``psycopg2`` or ``psycopg``."""
    return sibling(url, make_url(url).database or "", driver)


def backend_url(url: str) -> str:
    """An SQLAlchemy URL as Celery's ``result_backend``."""
    return f"pgbarrier+{url}"


@contextmanager
def autocommit(url: str) -> Iterator[Connection]:
    """A connection of its own, each statement a transaction."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection


def new_name(kind: str, suffix: str = "") -> str:
    """A name that carries its date, so that :func:`sweep` can tell what is left over."""
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d")
    return f"{PREFIX}_{kind}_{today}_{suffix or uuid.uuid4().hex[:12]}"


def schema_hash() -> str:
    """Identifies the schema: a hash of everything that makes it."""
    root = Path(celery_pgbarrier.store.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([root / "schema.py", *(root / "migrations").rglob("*.py")]):
        digest.update(path.read_bytes())
    for function in FUNCTIONS.values():
        digest.update(function.definition.encode())
    return digest.hexdigest()[:12]


def template(admin_url: str) -> str:
    """The name of the migrated template; made now if this schema has none yet.

    Safe when many processes ask at once, and a template that exists is complete: it gets its name
    when all is done.
    """
    from celery_pgbarrier.store import schema

    name = new_name("template", schema_hash())
    with autocommit(admin_url) as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": TEMPLATE_LOCK})
        if not _exists(connection, name):
            with temporary_database(admin_url) as url:
                schema.migrate(url)
                building = make_url(url).database
                connection.exec_driver_sql(f"ALTER DATABASE {building} ALLOW_CONNECTIONS false")
                connection.exec_driver_sql(f"ALTER DATABASE {building} RENAME TO {name}")
    return name


def _exists(connection: Connection, name: str) -> bool:
    query = text("SELECT 1 FROM pg_database WHERE datname = :name")
    return connection.execute(query, {"name": name}).scalar() is not None


@contextmanager
def temporary_database(admin_url: str, source: str = "template0") -> Iterator[str]:
    """The URL of a new database, a copy of ``source``, dropped at the end."""
    name = new_name("test")
    with autocommit(admin_url) as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {source}")
    try:
        yield sibling(admin_url, name)
    finally:
        with autocommit(admin_url) as connection:
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def sweep(admin_url: str) -> None:
    """Drop what sessions that were killed left behind before yesterday."""
    yesterday = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    old = text("""
        SELECT datname FROM pg_database
        WHERE datname ~ :pattern AND split_part(datname, '_', 3) < :day
    """)
    values = {
        "pattern": f"^{PREFIX}_(template|test)_[0-9]{{8}}_[0-9a-f]{{12}}$",
        "day": yesterday.strftime("%Y%m%d"),
    }
    with autocommit(admin_url) as connection:
        for name in connection.execute(old, values).scalars().all():
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


LEAKS = text("""
    SELECT format('process %s is %s, last statement: %s', pid, state, query)
    FROM pg_stat_activity
    WHERE datname = :name AND state LIKE 'idle in transaction%'
    UNION ALL
    SELECT format('process %s holds advisory lock %s/%s', l.pid, l.classid, l.objid)
    FROM pg_locks l JOIN pg_database d ON d.oid = l.database
    WHERE d.datname = :name AND l.locktype = 'advisory' AND l.granted
""")


def leaks(admin_url: str, url: str, grace: float = 3.0) -> list[str]:
    """The open transactions and advisory locks that outlast ``grace`` seconds in a database.

    The grace is for the server to notice clients that were killed.
    """
    found: list[str] = []
    with autocommit(admin_url) as connection:

        def none_left() -> bool:
            found[:] = connection.execute(LEAKS, {"name": make_url(url).database}).scalars()
            return not found

        try:
            wait_until(none_left, grace)
        except AssertionError:
            return found
    return []
