"""Where a block of ``self.transaction()`` writes: sessions, connections, schemas, databases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from celery_pgbarrier import ConfigurationError, TransactionError
from celery_pgbarrier.store import schema
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.charges import TABLE, Charge, charge
from tests.support.inline import InlineWorker, workers
from tests.support.tables import Tables
from tests.support.tasks import hooked, noted, notes

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]
Charges = Callable[[], list[str]]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


@pytest.fixture
def engine(database_url: str, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The user's own engine, on the database of the result backend."""
    made = create_engine(
        databases.with_driver(database_url, getattr(request, "param", "psycopg2")), pool_size=1
    )
    yield made
    assert made.pool.checkedout() == 0  # type: ignore[attr-defined]
    made.dispose()


def insert(connection: Connection, name: str) -> None:
    connection.execute(text("INSERT INTO charge (name) VALUES (:name)"), {"name": name})


#: How the user gives a place, and writes in it.
def with_engine(engine: Engine, run: Callable[[Any, Any], None]) -> None:
    run(engine, lambda tx, name: insert(tx.connection, name))


def with_engine_and_models(engine: Engine, run: Callable[[Any, Any], None]) -> None:
    run(engine, charge)


def with_connection(engine: Engine, run: Callable[[Any, Any], None]) -> None:
    with engine.connect() as connection:
        run(connection, lambda tx, name: insert(connection, name))
        assert not connection.in_transaction()


def with_session(engine: Engine, run: Callable[[Any, Any], None]) -> None:
    with Session(engine) as session:
        run(session, lambda tx, name: session.add(Charge(name=name)))
        assert not session.in_transaction()
        assert not session.new


def with_session_on_a_connection(engine: Engine, run: Callable[[Any, Any], None]) -> None:
    with engine.connect() as connection, Session(connection) as session:
        run(session, lambda tx, name: session.execute(text("INSERT INTO charge (name) VALUES (:n)"),
                                                      {"n": name}))  # fmt: skip


def with_sessionmaker(engine: Engine, run: Callable[[Any, Any], None]) -> None:
    run(sessionmaker(engine), charge)


def with_scoped_session(engine: Engine, run: Callable[[Any, Any], None]) -> None:
    scoped = scoped_session(sessionmaker(engine))
    run(scoped, lambda tx, name: scoped.add(Charge(name=name)))
    scoped.remove()


PLACES = [
    with_engine,
    with_engine_and_models,
    with_connection,
    with_session,
    with_session_on_a_connection,
    with_sessionmaker,
    with_scoped_session,
]


@pytest.mark.parametrize("engine", ["psycopg2", "psycopg"], indirect=True)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_place_of_the_users(
    engine: Engine, worker: InlineWorker, hook: Hook, charges: Charges, tmp_path: Any,
    place: Callable[..., None],
) -> None:  # fmt: skip
    """It commits once, is left at its first use when the step is done, and rolls back on errors."""

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        values: list[Any] = []

        def block(on: Any, write: Callable[[Any, str], None]) -> None:
            with task.transaction("charge", on=on) as tx:
                write(tx, f"run {task.request.retries}")
                noted.delay(task.request.retries, str(tmp_path / "told"))
                tx.set(task.request.retries)
                if task.request.retries == 0:
                    raise ValueError("the first run fails")
            values.append(tx.value)

        try:
            place(engine, block)
        except ValueError as error:
            raise task.retry(countdown=0) from error
        if task.request.retries == 1:
            raise task.retry(countdown=0)
        return values

    result = hooked.delay(1, "charge")
    worker.step()
    assert charges() == []
    worker.drain()
    assert result.get(timeout=5) == [1]
    assert charges() == ["run 1"]
    assert notes(tmp_path / "told") == ["1"]


def test_a_done_block_that_uses_nothing_of_it_writes_nothing(
    engine: Engine, worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    """What is pending in the session is dropped, not written by the next commit."""
    passed: list[int] = []

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with Session(engine) as session:
            with task.transaction("charge", on=session):
                session.add(Charge(name=f"run {task.request.retries}"))
                passed.append(task.request.retries)
            session.commit()
        if task.request.retries == 0:
            raise task.retry(countdown=0)

    hooked.delay(1, "charge")
    worker.drain()
    assert passed == [0, 1]
    assert charges() == ["run 0"]


# -- refused


def refused(
    worker: InlineWorker, hook: Hook, kind: type[Exception], body: Callable[[Any], None]
) -> str:
    errors: list[Exception] = []

    @hook("refused")
    def run(task: Any, value: Any) -> Any:
        try:
            body(task)
        except kind as error:
            errors.append(error)

    hooked.delay(1, "refused")
    worker.drain()
    (error,) = errors
    return str(error)


def block(task: Any, name: str = "refused", **place: Any) -> None:
    with task.transaction("charge", **place) as tx:
        charge(tx, name)


def test_a_place_in_a_transaction_is_refused_and_left_alone(
    engine: Engine, worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    with Session(engine) as session:
        session.add(Charge(name="before"))
        session.flush()
        said = refused(worker, hook, TransactionError, lambda task: block(task, on=session))
        assert "commit it or roll it back before" in said
        session.commit()
    with engine.connect() as connection:
        insert(connection, "before, too")
        said = refused(worker, hook, TransactionError, lambda task: block(task, on=connection))
        assert "commit it or roll it back before" in said
        connection.commit()
    assert charges() == ["before", "before, too"]


def test_a_commit_of_the_users_place_is_refused(
    engine: Engine, worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    def with_session(task: Any) -> None:
        with Session(engine) as session, task.transaction("charge", on=session):
            session.add(Charge(name="a"))
            with session.begin_nested():  # a savepoint is none
                session.add(Charge(name="b"))
            session.commit()

    def with_connection(task: Any) -> None:
        with engine.connect() as connection, task.transaction("charge", on=connection):
            insert(connection, "a")
            connection.commit()

    for body in (with_session, with_connection):
        said = refused(worker, hook, TransactionError, body)
        assert "take the commit out of the block" in said
    assert charges() == []
    with Session(engine) as session:  # nothing of it stays with the engine
        session.add(Charge(name="after"))
        session.commit()
    assert charges() == ["after"]


def test_an_autocommit_place_is_refused(
    engine: Engine, worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    for place in (autocommit, sessionmaker(autocommit)):
        said = refused(
            worker, hook, ConfigurationError, lambda task, place=place: block(task, on=place)
        )
        assert 'execution_options(isolation_level="READ COMMITTED")' in said
    assert charges() == []


@pytest.mark.parametrize("migrated", [False, True])
def test_another_database_is_refused(
    worker: InlineWorker, hook: Hook, empty_database_url: str, migrated: bool, charges: Charges
) -> None:
    if migrated:
        schema.migrate(empty_database_url)
    other = Tables(empty_database_url)
    other.ask(TABLE)
    engine = create_engine(empty_database_url, poolclass=NullPool)
    said = refused(worker, hook, ConfigurationError, lambda task: block(task, on=engine))
    assert "another database than the result backend's" in said
    assert other.value("SELECT count(*) FROM charge") == 0
    assert charges() == []


def test_another_kind_of_database_is_refused(worker: InlineWorker, hook: Hook) -> None:
    engine = create_engine("sqlite://")
    said = refused(worker, hook, ConfigurationError, lambda task: block(task, on=engine))
    assert "not sqlite" in said


def test_what_is_no_place_is_refused(worker: InlineWorker, hook: Hook) -> None:
    said = refused(worker, hook, ConfigurationError, lambda task: block(task, on="default"))
    assert "takes an SQLAlchemy Session" in said
    assert "not str" in said
    said = refused(
        worker, hook, ConfigurationError, lambda task: block(task, on=object(), using="default")
    )
    assert "on= or using=, not both" in said


# -- a schema of its own


def test_the_tables_may_have_a_schema_of_their_own(
    make_app: Callable[..., Celery], redis_broker: Broker, hook: Hook, empty_database_url: str,
    tmp_path: Any,
) -> None:  # fmt: skip
    tables = Tables(empty_database_url)
    tables.ask(TABLE)
    app = make_app(
        redis_broker, databases.backend_url(empty_database_url), pgbarrier_schema="Odd-Name"
    )
    engine = create_engine(empty_database_url, poolclass=NullPool)

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        for step, place in (("own", None), ("users", engine)):
            with task.transaction(step, on=place) as tx:
                charge(tx, f"{step} {task.request.retries}")
                noted.delay(1, str(tmp_path / step))
        if task.request.retries == 0:
            raise task.retry(countdown=0)

    with workers(app, redis_broker) as make:
        result = hooked.delay(1, "charge")
        make().drain()
    assert result.get(timeout=5) == 1
    names = [row.name for row in tables.ask("SELECT name FROM charge ORDER BY id")]
    assert names == ["own 0", "users 0"]
    assert tables.value('SELECT count(*) FROM "Odd-Name".pgbarrier_effect') == 2
    assert notes(tmp_path / "own") == notes(tmp_path / "users") == ["1"]


# -- without the backend's database


def test_without_the_pgbarrier_backend(
    make_app: Callable[..., Celery], redis_broker: Broker, hook: Hook, engine: Engine,
    charges: Charges,
) -> None:  # fmt: skip
    """Tests of tasks may have another backend: a place of the user's is a plain transaction."""
    make_app(redis_broker, "cache+memory://")

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge", on=engine if value else None) as tx:
            charge(tx)
            tx.set(value)
        return tx.value

    assert hooked(7, "charge") == 7
    with pytest.raises(ConfigurationError, match="set result_backend to pgbarrier://"):
        hooked(0, "charge")
    assert charges() == ["once"]
