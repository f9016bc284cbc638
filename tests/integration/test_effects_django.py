"""``self.transaction(using=...)``: the block writes through Django's models."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chord
from sqlalchemy import make_url

from celery_pgbarrier import ConfigurationError, TransactionError
from celery_pgbarrier.store import schema
from tests.support.charges import TABLE, Died, die
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import add, hooked, noted, notes
from tests.support.wire import Wire

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]
Charges = Callable[[], list[str]]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


def settings_of(url: str, **options: Any) -> dict[str, Any]:
    parsed = make_url(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parsed.database,
        "USER": parsed.username,
        "PASSWORD": parsed.password or "",
        "HOST": parsed.host,
        "PORT": parsed.port,
        "OPTIONS": {**parsed.query, **options},
    }


@pytest.fixture(scope="module")
def django() -> SimpleNamespace:
    """Django, configured for this process: its database modules and a model."""
    import django
    from django.conf import settings

    settings.configure(
        DATABASES={"default": settings_of("postgresql://nobody@127.0.0.1:1/none")}, USE_TZ=True
    )
    django.setup()
    from django.db import connections, models, transaction

    class Charge(models.Model):  # type: ignore[misc]
        name = models.TextField()

        class Meta:
            app_label = "charges"
            db_table = "charge"

    return SimpleNamespace(connections=connections, transaction=transaction, Charge=Charge)


@pytest.fixture
def connect(django: SimpleNamespace) -> Iterator[Callable[..., None]]:
    """``connect(alias, url, **options)``: give Django a database."""
    made: list[str] = []

    def make(alias: str, url: str, **options: Any) -> None:
        django.connections.databases[alias] = settings_of(url, **options)
        django.connections.configure_settings(django.connections.databases)  # fills defaults in
        django.connections[alias] = django.connections.create_connection(alias)
        made.append(alias)

    yield make
    for alias in made:
        django.connections[alias].close()
        del django.connections[alias]


@pytest.fixture
def model(
    django: SimpleNamespace, connect: Callable[..., None], database_url: str,
    request: pytest.FixtureRequest,
) -> Any:  # fmt: skip
    """A model in the database of the result backend."""
    connect("default", database_url, server_side_binding=getattr(request, "param", False))
    return django.Charge


@pytest.mark.parametrize("model", [False, True], indirect=True, ids=["client", "server-side"])
def test_writes_messages_and_value_are_committed_once(
    worker: InlineWorker, hook: Hook, charges: Charges, model: Any, tables: Tables, tmp_path: Path
) -> None:
    passed: list[int] = []

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge", using="default") as tx:
            model.objects.create(name=f"run {len(passed)}")
            noted.delay(len(passed), str(tmp_path / "told"))
            chord([add.s(1, 1), add.s(2, 2)])(noted.s(str(tmp_path / "chord")))
            tx.set({"run": len(passed)})
            passed.append(1)
        if task.request.retries == 0:
            raise Died
        return tx.value

    hooked.apply_async((1, "charge"), retries=0)
    die(worker)
    assert charges() == ["run 0"]

    @hook("charge")
    def again(task: Any, value: Any) -> Any:
        with task.transaction("charge", using="default") as tx:
            model.objects.create(name="again")
            passed.append(2)
        return tx.value

    worker.drain()
    assert passed == [1]
    assert charges() == ["run 0"]
    assert tables.value("SELECT status FROM pgbarrier_task WHERE name = 'test.hooked'") == "SUCCESS"
    assert notes(tmp_path / "told") == ["0"]
    assert notes(tmp_path / "chord") == ["[2, 4]"]


def test_a_done_block_is_rolled_back_without_a_query(
    worker: InlineWorker, hook: Hook, charges: Charges, model: Any, django: SimpleNamespace
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        connection = django.connections["default"]
        with task.transaction("charge", on=connection) as tx:
            if not tx.done:
                model(name="once").save()
                tx.set("stored")
        assert not connection.in_atomic_block
        if task.request.retries == 0:
            raise task.retry(countdown=0)
        model.objects.create(name="after")
        return [tx.done, tx.value, model.objects.count()]

    result = hooked.delay(1, "charge")
    worker.drain()
    assert result.get(timeout=5) == [True, "stored", 2]
    assert charges() == ["once", "after"]


def test_an_error_rolls_back(
    worker: InlineWorker, hook: Hook, charges: Charges, model: Any, tmp_path: Path
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge", using="default"):
            model.objects.create(name=f"run {task.request.retries}")
            noted.delay(task.request.retries, str(tmp_path / "told"))
            if task.request.retries == 0:
                raise task.retry(countdown=0)

    hooked.delay(1, "charge")
    worker.step()
    assert charges() == []
    worker.drain()
    assert charges() == ["run 1"]
    assert notes(tmp_path / "told") == ["1"]


def test_hooks_run_at_the_commit_and_their_errors_are_raised_after_it(
    worker: InlineWorker, hook: Hook, charges: Charges, model: Any, django: SimpleNamespace,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The block is committed and its messages are published all the same."""
    ran: list[str] = []

    def fails() -> None:
        ran.append("hook")
        raise ValueError("of the hook")

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge", using="default"):
            model.objects.create(name="once")
            noted.delay(1, str(tmp_path / "told"))
            django.transaction.on_commit(fails)

    result = hooked.delay(1, "charge")
    worker.drain()
    with pytest.raises(ValueError, match="of the hook"):
        result.get(timeout=5)
    assert ran == ["hook"]
    assert charges() == ["once"]
    assert notes(tmp_path / "told") == ["1"]


def test_a_deferred_constraint_fails_the_commit(
    worker: InlineWorker, hook: Hook, charges: Charges, model: Any, tables: Tables, tmp_path: Path
) -> None:
    tables.ask("""
        ALTER TABLE charge DROP CONSTRAINT IF EXISTS apart,
              ADD CONSTRAINT apart UNIQUE (name) DEFERRABLE INITIALLY DEFERRED""")

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge", using="default"):
            for _ in range(2):
                model.objects.create(name="twice")
            noted.delay(1, str(tmp_path / "told"))

    result = hooked.delay(1, "charge")
    worker.drain()
    tables.ask("ALTER TABLE charge DROP CONSTRAINT apart")
    with pytest.raises(Exception, match="duplicate key"):
        result.get(timeout=5)
    assert charges() == []
    assert notes(tmp_path / "told") == []


def test_an_answer_to_commit_that_is_lost_is_looked_up(
    worker: InlineWorker, hook: Hook, charges: Charges, django: SimpleNamespace,
    connect: Callable[..., None], wire: Wire,
) -> None:  # fmt: skip
    connect("default", wire.url)

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge", using="default") as tx:
            django.Charge.objects.create(name="once")
            tx.set("stored")
            wire.cut("COMMIT")
        assert wire.was_cut
        django.connections["default"].close()
        return tx.value

    result = hooked.delay(1, "charge")
    worker.drain()
    assert result.get(timeout=5) == "stored"
    assert charges() == ["once"]


def test_once_goes_on_after_a_lost_connection(
    worker: InlineWorker, hook: Hook, charges: Charges, model: Any, django: SimpleNamespace,
    tables: Tables,
) -> None:  # fmt: skip
    calls: list[int] = []

    def step(tx: Any) -> int:
        calls.append(1)
        model.objects.create(name=f"call {len(calls)}")
        if len(calls) == 1:
            tables.cut_connections()
        return len(calls)

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        return task.once("charge", step, using="default")

    result = hooked.delay(1, "charge")
    worker.drain()
    assert result.get(timeout=5) == 2
    assert charges() == ["call 2"]


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


@pytest.mark.parametrize("migrated", [False, True])
def test_another_database_is_refused(
    worker: InlineWorker, hook: Hook, django: SimpleNamespace, connect: Callable[..., None],
    empty_database_url: str, migrated: bool,
) -> None:  # fmt: skip
    if migrated:
        schema.migrate(empty_database_url)
    other = Tables(empty_database_url)
    other.ask(TABLE)
    connect("other", empty_database_url)

    def body(task: Any) -> None:
        with task.transaction("charge", using="other"):
            django.Charge.objects.using("other").create(name="a")

    said = refused(worker, hook, ConfigurationError, body)
    assert "another database than the result backend's" in said
    assert other.value("SELECT count(*) FROM charge") == 0
    assert not django.connections["other"].in_atomic_block


def test_an_atomic_block_around_it_is_refused(
    worker: InlineWorker, hook: Hook, charges: Charges, model: Any, django: SimpleNamespace
) -> None:
    def body(task: Any) -> None:
        with django.transaction.atomic(), task.transaction("charge", using="default"):
            model.objects.create(name="a")

    said = refused(worker, hook, TransactionError, body)
    assert "outside of transaction.atomic()" in said
    assert charges() == []


def test_a_session_on_django_is_refused(
    worker: InlineWorker, hook: Hook, model: Any, charges: Charges
) -> None:
    def body(task: Any) -> None:
        with task.transaction("charge", using="default") as tx:
            tx.session.flush()

    assert "use Django's models" in refused(worker, hook, TransactionError, body)


def test_an_alias_that_is_not_postgresql_is_refused(
    worker: InlineWorker, hook: Hook, django: SimpleNamespace, connect: Callable[..., None]
) -> None:
    connect("default", "postgresql://nobody@127.0.0.1:1/none")
    django.connections.databases["default"]["ENGINE"] = "django.db.backends.sqlite3"
    django.connections["default"] = django.connections.create_connection("default")

    def body(task: Any) -> None:
        with task.transaction("charge", using="default"):
            pass

    assert "is sqlite" in refused(worker, hook, ConfigurationError, body)


# -- outside a worker


def test_as_a_function_it_is_a_plain_atomic_block(
    app: Celery, hook: Hook, charges: Charges, model: Any, django: SimpleNamespace
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge", using="default") as tx:
            model.objects.create(name=str(value))
            if value == 2:
                raise ValueError("as told")
            tx.set(value)
        return tx.value

    assert hooked(1, "charge") == 1
    with pytest.raises(ValueError, match="as told"):
        hooked(2, "charge")
    assert charges() == ["1"]


def test_it_works_inside_of_djangos_test_case(
    app: Celery, hook: Hook, charges: Charges, model: Any, django: SimpleNamespace
) -> None:
    """Its tests run in an atomic block, which is rolled back."""
    from django.test import TestCase

    seen: list[int] = []

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge", using="default") as tx:
            model.objects.create(name="a")
            tx.set(1)
        return tx.value

    class Case(TestCase):  # type: ignore[misc]
        def runTest(self) -> None:
            seen.append(hooked(1, "charge"))
            seen.append(model.objects.count())

    outcome = unittest.TestResult()
    unittest.TestSuite([Case()]).run(outcome)
    assert outcome.errors == outcome.failures == []
    assert seen == [1, 1]
    assert charges() == []
