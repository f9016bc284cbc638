"""The tables: made once, the same by every way, checked at the first use."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command as alembic_command
from celery import Celery, chord
from click.testing import CliRunner
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from celery_pgbarrier import reaper
from celery_pgbarrier.cli import pgbarrier
from celery_pgbarrier.errors import PgBarrierError, SchemaError, ServerTooOld
from celery_pgbarrier.store import schema, sql
from celery_pgbarrier.store.database import Database
from celery_pgbarrier.store.url import parse_url
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.inline import workers
from tests.support.services import libpq_url
from tests.support.tables import Tables, close_pools
from tests.support.tasks import add, xsum

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_connections_left() -> Iterator[None]:
    yield
    close_pools()


def database(url: str, **options: Any) -> Database:
    return Database(parse_url(url), engine_options={"poolclass": NullPool}, **options)


def use(database: Database) -> None:
    database.statement(sql.RESULTS, {"ids": ["one"]})


def shape(url: str, name: str = "public") -> dict[str, list[Any]]:
    """Everything that the catalogue says of the tables in a schema, as text."""
    queries = {
        "columns": """
            SELECT c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod),
                   a.attnotnull, pg_get_expr(d.adbin, d.adrelid), a.attstorage
              FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
              LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
             WHERE c.relnamespace = to_regnamespace(:name) AND c.relkind = 'r' AND a.attnum > 0
             ORDER BY 1, 2""",
        "tables": """
            SELECT relname, reloptions, relpersistence FROM pg_class
             WHERE relnamespace = to_regnamespace(:name) AND relkind = 'r' ORDER BY 1""",
        "constraints": """
            SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
              FROM pg_constraint WHERE connamespace = to_regnamespace(:name) ORDER BY 1, 2""",
        "indexes": """
            SELECT tablename, indexname, replace(indexdef, :name || '.', '') FROM pg_indexes
             WHERE schemaname = :name ORDER BY 1, 2""",
        "functions": """
            SELECT proname FROM pg_proc WHERE pronamespace = to_regnamespace(:name) ORDER BY 1""",
    }
    engine = create_engine(url, poolclass=NullPool)
    found: dict[str, list[Any]] = {}
    with engine.connect() as connection:
        connection.execute(text(f'SET search_path = "{name}"'))
        for key, query in queries.items():
            rows = connection.execute(text(query), {"name": name})
            found[key] = [tuple(row) for row in rows]
        for table in ("version", "reaper"):
            rows = connection.execute(text(f"SELECT * FROM pgbarrier_{table}"))
            found[table] = [tuple(row) for row in rows]
    return found


# -- made once


RACE = """
import os, sys
from celery_pgbarrier.store import sql
from celery_pgbarrier.store.database import Database
from celery_pgbarrier.store.url import parse_url
from sqlalchemy.pool import NullPool

url, count = sys.argv[1], int(sys.argv[2])
gate_in, gate_out = os.pipe()
children = []
for _ in range(count):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(gate_out)
            os.read(gate_in, 1)  # end of file: all are there
            database = Database(parse_url(url), engine_options={"poolclass": NullPool})
            database.statement(sql.RESULTS, {"ids": ["one"]}, patience=60)
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(code)
    children.append(pid)
os.close(gate_out)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
sys.exit(sum(code != 0 for code in codes))
"""


def test_50_processes_that_start_at_once_migrate_once(
    empty_database_url: str, database_url: str
) -> None:
    """A second migration would fail, for the tables are there."""
    done = subprocess.run(
        [sys.executable, "-c", RACE, empty_database_url, "50"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shape(empty_database_url) == shape(database_url)


# -- the same by every way


@pytest.mark.parametrize("name", [None, "jobs", "Odd-Name"])
def test_the_printed_ddl_makes_the_same_tables(
    empty_database_url: str, database_url: str, name: str | None
) -> None:
    script = schema.script(name)
    assert "INSERT INTO" in script
    psql(empty_database_url, script)
    place = name or "public"
    if name is None:
        assert shape(empty_database_url) == shape(database_url)
    else:
        printed = shape(empty_database_url, place)
        psql(empty_database_url, f'DROP SCHEMA "{name}" CASCADE;')
        schema.migrate(empty_database_url, name)
        assert printed == shape(empty_database_url, place)
    use(database(empty_database_url, schema=name, auto_migrate=False))


def psql(url: str, script: str) -> None:
    """Run a script as psql does: statement by statement, without a driver's parameters."""
    import psycopg2

    connection = psycopg2.connect(libpq_url(url))
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(script)
    finally:
        connection.close()


def test_migrating_again_changes_nothing(database_url: str) -> None:
    before = shape(database_url)
    schema.migrate(database_url)
    assert shape(database_url) == before


def test_a_migration_that_fails_leaves_nothing(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = Tables(empty_database_url)
    tables.ask("CREATE TABLE pgbarrier_reaper (mine text)")  # in the way of the last table
    with pytest.raises(Exception, match="already exists"):
        schema.migrate(empty_database_url)
    names = tables.ask("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert [row[0] for row in names] == ["pgbarrier_reaper"]


# -- the command line


@pytest.fixture
def command(
    make_app: Callable[..., Celery], redis_broker: Broker
) -> Callable[..., tuple[int, str]]:
    """``celery -A app pgbarrier ...`` in this process; its exit code and output."""

    def run(url: str, *arguments: str, **settings: Any) -> tuple[int, str]:
        app = make_app(redis_broker, databases.backend_url(url), **settings)
        context = type("Context", (), {"app": app})()
        result = CliRunner().invoke(pgbarrier, list(arguments), obj=context)
        return result.exit_code, result.output

    return run


def test_migrate(
    command: Callable[..., tuple[int, str]], empty_database_url: str, database_url: str
) -> None:
    code, output = command(empty_database_url, "migrate", pgbarrier_auto_migrate=False)
    assert (code, output) == (0, f"pgbarrier tables are at version {schema.head()}\n")
    assert shape(empty_database_url) == shape(database_url)
    assert command(empty_database_url, "migrate", pgbarrier_auto_migrate=False)[0] == 0


def test_migrate_sql_touches_nothing(
    command: Callable[..., tuple[int, str]], empty_database_url: str
) -> None:
    code, output = command(empty_database_url, "migrate", "--sql")
    assert (code, output.strip()) == (0, schema.script().strip())
    tables = Tables(empty_database_url)
    assert tables.value("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0


def test_reap_once(command: Callable[..., tuple[int, str]], database_url: str) -> None:
    code, output = command(database_url, "reap", "--once")
    assert code == 0
    assert "messages published 0" in output


def test_errors_of_the_command_line_are_one_line(
    command: Callable[..., tuple[int, str]], empty_database_url: str
) -> None:
    code, output = command(empty_database_url, "reap", "--once", pgbarrier_auto_migrate=False)
    assert code == 1
    assert output.startswith("Error: no pgbarrier tables in")
    assert "Traceback" not in output
    code, output = command("postgresql+psycopg2://u:s3cret@127.0.0.1:1/d", "migrate")
    assert code == 1
    assert "s3cret" not in output
    code, output = command(empty_database_url, "migrate", pgbarrier_leese=1)
    assert code == 1
    assert "did you mean pgbarrier_lease?" in output


def test_another_backend_is_told_what_to_set(
    make_app: Callable[..., Celery], redis_broker: Broker
) -> None:
    app = make_app(redis_broker, "cache+memory://")
    result = CliRunner().invoke(pgbarrier, ["migrate"], obj=type("Context", (), {"app": app})())
    assert result.exit_code == 1
    assert "set it to pgbarrier://" in result.output


def test_the_command_is_found_by_celery(empty_database_url: str) -> None:
    env = {**os.environ, "PGBARRIER_TEST_BACKEND": databases.backend_url(empty_database_url)}
    argv = [sys.executable, "-m", "celery", "-A", "tests.support.app", "pgbarrier", "migrate"]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "at version" in done.stdout


# -- checked


def test_missing_tables_are_made_at_the_first_use(
    empty_database_url: str, database_url: str
) -> None:
    use(database(empty_database_url))
    assert shape(empty_database_url) == shape(database_url)


def test_missing_tables_are_an_error_where_they_are_not_to_be_made(empty_database_url: str) -> None:
    with pytest.raises(SchemaError, match=r"no pgbarrier tables.*celery -A proj pgbarrier migrate"):
        use(database(empty_database_url, auto_migrate=False))
    with pytest.raises(SchemaError, match="no pgbarrier tables in schema 'jobs'"):
        use(database(empty_database_url, auto_migrate=False, schema="jobs"))


def at_version(url: str, version: str) -> None:
    """Make the tables as an older release left them."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        config = schema._config(None)
        config.attributes["connection"] = connection
        alembic_command.upgrade(config, version)


def test_tables_that_are_behind(empty_database_url: str, database_url: str) -> None:
    """They are refused, or brought up to date: to the same as tables that are made today."""
    at_version(empty_database_url, "0001")
    said = rf"at version 0001.*needs {schema.head()}: run `celery -A proj pgbarrier migrate`"
    with pytest.raises(SchemaError, match=said):
        use(database(empty_database_url, auto_migrate=False))
    use(database(empty_database_url))
    assert shape(empty_database_url) == shape(database_url)


@pytest.mark.parametrize("auto", [False, True])
def test_tables_that_are_ahead(database_url: str, auto: bool) -> None:
    Tables(database_url).ask("UPDATE pgbarrier_version SET version_num = '9999'")
    with pytest.raises(SchemaError, match=r"version 9999.*does not know: upgrade celery-pgbarrier"):
        use(database(database_url, auto_migrate=auto))


@pytest.mark.parametrize(
    "damage", ["DROP TABLE pgbarrier_task", "ALTER TABLE pgbarrier_task DROP result"]
)
def test_a_table_that_has_gone(database_url: str, damage: str) -> None:
    used = database(database_url)
    use(used)
    Tables(database_url).ask(damage)
    with pytest.raises(SchemaError, match="does not exist: run `celery -A proj pgbarrier migrate`"):
        use(used)


@pytest.mark.parametrize("auto", [False, True])
def test_a_server_that_is_too_old(
    database_url: str, monkeypatch: pytest.MonkeyPatch, auto: bool
) -> None:
    monkeypatch.setattr(schema, "OLDEST_SERVER", 990000)
    with pytest.raises(ServerTooOld, match=r"PostgreSQL \d+ is too old.*upgrade the server"):
        use(database(database_url, auto_migrate=auto))


def test_a_database_that_does_not_exist(postgres_server: str) -> None:
    url = databases.sibling(postgres_server, "no_such_database")
    with pytest.raises(PgBarrierError, match="no_such_database"):
        use(database(url))


# -- roles


@pytest.fixture
def role(postgres_server: str) -> Iterator[tuple[str, str]]:
    """A role that may connect, and nothing else."""
    name, password = f"pgbarrier_test_{uuid.uuid4().hex[:8]}", "s3cret"
    with databases.autocommit(postgres_server) as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
        yield name, password
    with databases.autocommit(postgres_server) as connection:
        connection.exec_driver_sql(f"DROP ROLE {name}")


def as_role(url: str, role: tuple[str, str]) -> str:
    changed = make_url(url).set(username=role[0], password=role[1])
    return changed.render_as_string(hide_password=False)


def disown(url: str, role: tuple[str, str]) -> None:
    Tables(url).ask(f"DROP OWNED BY {role[0]}")


@pytest.mark.parametrize("name", [None, "jobs"])
@pytest.mark.parametrize("auto", [False, True], ids=["checked", "auto_migrate"])
def test_dml_rights_are_enough_at_run_time(
    make_app: Callable[..., Celery], redis_broker: Broker, empty_database_url: str,
    role: tuple[str, str], name: str | None, auto: bool,
) -> None:  # fmt: skip
    """A chord, a reaper pass and a purge, by a role that may not make tables."""
    place = name or "public"
    schema.migrate(empty_database_url, name)
    tables = Tables(empty_database_url)
    tables.ask("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    tables.ask(f"GRANT USAGE ON SCHEMA {place} TO {role[0]}")
    rights = "SELECT, INSERT, UPDATE, DELETE"
    tables.ask(f"GRANT {rights} ON ALL TABLES IN SCHEMA {place} TO {role[0]}")
    try:
        app = make_app(
            redis_broker,
            databases.backend_url(as_role(empty_database_url, role)),
            pgbarrier_schema=name,
            pgbarrier_auto_migrate=auto,
        )
        with workers(app, redis_broker) as make:
            result = chord([add.s(1, 1), add.s(2, 2) | add.s(1)], xsum.s()).delay()
            make().drain()
            assert result.get(timeout=5) == 7
        reaper.run_once(app.backend)
        app.backend.cleanup()
        assert tables.value(f'SELECT count(*) FROM "{place}".pgbarrier_task') == 4
    finally:
        app.backend.database.dispose()
        disown(empty_database_url, role)


def test_missing_rights_are_named(database_url: str, role: tuple[str, str]) -> None:
    with pytest.raises(SchemaError, match="grant SELECT, INSERT, UPDATE and DELETE") as error:
        use(database(as_role(database_url, role)))
    assert "s3cret" not in str(error.value)


def test_a_role_that_may_not_make_tables_is_told_so(
    empty_database_url: str, role: tuple[str, str]
) -> None:
    tables = Tables(empty_database_url)
    tables.ask("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    with pytest.raises(SchemaError, match="pgbarrier migrate"):
        use(database(as_role(empty_database_url, role)))


# -- a schema of its own


def test_everything_goes_into_the_schema_that_is_set(
    make_app: Callable[..., Celery], redis_broker: Broker, empty_database_url: str
) -> None:
    app = make_app(
        redis_broker, databases.backend_url(empty_database_url), pgbarrier_schema="Odd-Name"
    )
    with workers(app, redis_broker) as make:
        result = chord([add.s(1, 1), add.s(2, 2)], xsum.s()).delay()
        make().drain()
        assert result.get(timeout=5) == 6
    tables = Tables(empty_database_url)
    found = tables.ask("SELECT DISTINCT schemaname FROM pg_tables WHERE tablename ~ '^pgbarrier_'")
    assert [row[0] for row in found] == ["Odd-Name"]
    assert tables.value('SELECT count(*) FROM "Odd-Name".pgbarrier_task') == 3


def test_two_schemas_of_a_database_know_nothing_of_each_other(empty_database_url: str) -> None:
    for name in ("one", "two"):
        use(database(empty_database_url, schema=name))
    tables = Tables(empty_database_url)
    assert tables.value("SELECT count(*) FROM pg_tables WHERE tablename = 'pgbarrier_task'") == 2
    assert shape(empty_database_url, "one").keys() == shape(empty_database_url, "two").keys()


def test_the_ddl_from_a_version_on_upgrades_tables_of_that_version(empty_database_url: str) -> None:
    """What a DBA runs: the error that tables are behind names the command."""
    older, _, _ = schema.script().partition("-- Running upgrade 0003 ->")
    since = schema.script(since="0003")
    assert "CREATE TABLE pgbarrier_task" not in since
    with databases.autocommit(empty_database_url) as connection:
        connection.exec_driver_sql(older + "COMMIT;")
        assert schema.current(connection, None) == "0003"
        with pytest.raises(SchemaError, match="migrate --sql --from 0003`"):
            schema.require(connection, None)
        connection.exec_driver_sql(since)
        schema.require(connection, None)
    with pytest.raises(SchemaError, match="no version 0099"):
        schema.script(since="0099")
