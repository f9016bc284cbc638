"""The versions of the tables: check, migrate, print."""

from __future__ import annotations

import io
from importlib import resources

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from celery_pgbarrier.errors import SchemaError, ServerTooOld

VERSION_TABLE = "pgbarrier_version"
OLDEST_SERVER = 130000
MIGRATE = "run `celery -A proj pgbarrier migrate`, or give a DBA the output of `... migrate --sql`"
#: Key of the transaction-level advisory lock that lets one process migrate at a time.
_LOCK = 0x7067626172726965


def _config(schema: str | None, output: io.StringIO | None = None) -> Config:
    config = Config(output_buffer=output)
    location = resources.files("celery_pgbarrier.store").joinpath("migrations")
    config.set_main_option("script_location", str(location).replace("%", "%%"))
    config.attributes["schema"] = schema
    return config


def head() -> str:
    """Return the newest version that this package knows."""
    version = ScriptDirectory.from_config(_config(None)).get_current_head()
    assert version is not None
    return version


def _known() -> set[str]:
    scripts = ScriptDirectory.from_config(_config(None))
    return {script.revision for script in scripts.walk_revisions()}


def qualified(name: str, schema: str | None) -> str:
    """Return *name* qualified with *schema*, quoted for SQL."""
    return f'"{schema}".{name}' if schema else name


def current(connection: Connection, schema: str | None) -> str | None:
    """Return the version of the tables in the database, None where there are none.

    Raises:
        ServerTooOld: the server is older than PostgreSQL 13.
    """
    table = qualified(VERSION_TABLE, schema)
    server, exists = connection.execute(
        text("SELECT current_setting('server_version_num')::int, to_regclass(:table) IS NOT NULL"),
        {"table": table},
    ).one()
    if server < OLDEST_SERVER:
        raise ServerTooOld(
            f"PostgreSQL {server // 10000} is too old: celery-pgbarrier needs PostgreSQL 13 or "
            "newer; upgrade the server or point result_backend at a newer one"
        )
    if not exists:
        return None
    version: str | None = connection.execute(text(f"SELECT version_num FROM {table}")).scalar()
    return version


def require(connection: Connection, schema: str | None) -> None:
    """Check that the tables are those of this version.

    Raises:
        SchemaError: tables are missing, behind or ahead; the message names the remedy.
    """
    version, expected = current(connection, schema), head()
    place = f"schema {schema!r}" if schema else "the search path's first schema"
    if version is None:
        raise SchemaError(f"no pgbarrier tables in {place}: {MIGRATE}")
    if version != expected:
        if version in _known():
            raise SchemaError(
                f"pgbarrier tables in {place} are at version {version}, "
                f"this celery-pgbarrier needs {expected}: {MIGRATE[:-1]} --from {version}`"
            )
        raise SchemaError(
            f"pgbarrier tables in {place} are at version {version}, which this celery-pgbarrier "
            f"(version {expected}) does not know: upgrade celery-pgbarrier"
        )


def upgrade(connection: Connection, schema: str | None) -> None:
    """Bring the tables to this version, in the transaction of *connection*.

    Any number of processes may call this at once: the first migrates, the others wait and find
    the work done.
    """
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    version = current(connection, schema)
    if version is not None and (version == head() or version not in _known()):
        return
    if (
        schema
        and not connection.execute(
            text("SELECT 1 FROM pg_namespace WHERE nspname = :schema"), {"schema": schema}
        ).scalar()
    ):
        connection.execute(text(f'CREATE SCHEMA "{schema}"'))
    config = _config(schema)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def migrate(url: str, schema: str | None = None) -> None:
    """Bring the tables in the database at *url* (an SQLAlchemy URL) to this version."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        upgrade(connection, schema)


def script(schema: str | None = None, since: str | None = None) -> str:
    """Return the DDL of all versions, or of those after *since*, for a DBA to run.

    Raises:
        SchemaError: there is no version *since*.
    """
    if since is not None and since not in _known():
        known = ", ".join(sorted(_known()))
        raise SchemaError(f"the tables have no version {since}, but {known}: name one of these")
    output = io.StringIO()
    config = _config(schema, output)
    config.set_main_option("sqlalchemy.url", "postgresql+psycopg2://")
    if schema and since is None:
        output.write(f'CREATE SCHEMA IF NOT EXISTS "{schema}";\n\n')
    command.upgrade(config, f"{since}:head" if since else "head", sql=True)
    return output.getvalue()
