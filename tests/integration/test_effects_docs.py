"""The code in docs/effects.md and the README does what they say."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import create_engine, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool

from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import hooked

ROOT = Path(__file__).parents[2]


class Base(DeclarativeBase):
    pass


class Charge(Base):
    __tablename__ = "documented_charge"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    amount: Mapped[int]


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


@pytest.fixture
def documented(tables: Tables) -> Callable[[], list[tuple[int, int]]]:
    tables.ask("DROP TABLE IF EXISTS documented_charge")
    tables.ask("CREATE TABLE documented_charge (id serial PRIMARY KEY, order_id int, amount int)")
    query = "SELECT order_id, amount FROM documented_charge ORDER BY id"
    return lambda: [(row.order_id, row.amount) for row in tables.ask(query)]


def blocks(path: str) -> list[str]:
    """The Python code of a page that uses a transaction."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)
    return [code for code in found if "self.transaction" in code or "self.once" in code]


def tasks_of(path: str) -> list[str]:
    return [code for code in blocks(path) if "def pay" in code]


@pytest.mark.parametrize(
    "code", [*tasks_of("docs/effects.md"), *tasks_of("README.md")], ids=["with", "once", "README"]
)
def test_a_documented_task(
    app: Celery, worker: InlineWorker, documented: Callable[[], Any], code: str
) -> None:
    receipts: list[Any] = []

    @app.task(name="docs.receipt", shared=False)
    def receipt(number: Any) -> None:
        receipts.append(number)

    names = {
        "__name__": "docs",
        # Tasks of an app are those of all later ones too, unless it is told.
        "app": SimpleNamespace(task=partial(app.task, shared=False)),
        "Charge": Charge,
        "receipt": receipt,
        "insert": insert,
    }
    exec(code, names)
    pay: Any = names["pay"]
    runs = iter([True, False])
    body = pay.run

    def twice(order_id: int, amount: int) -> Any:
        value = body(order_id, amount)
        if next(runs):
            raise pay.retry(countdown=0)
        return value

    pay.run = twice
    result = pay.delay(7, 100)
    worker.drain()
    value = result.get(timeout=5)
    assert documented() == [(7, 100)]
    assert (value, receipts) in [(1, [1]), (100, []), (None, [7])]


def test_the_documented_places(
    worker: InlineWorker, documented: Callable[[], Any], hook: Any, tables: Tables
) -> None:
    (code,) = [code for code in blocks("docs/effects.md") if "SessionLocal" in code]
    lines = code.strip().splitlines()
    engine = create_engine(tables.url, poolclass=NullPool)

    @hook("documented")
    def run(task: Any, number: int) -> None:
        with Session(engine) as session:
            names = {
                "self": task,
                "engine": engine,
                "session": session,
                "SessionLocal": sessionmaker(engine),
            }
            with eval(lines[number], names) as tx:
                tx.session.add(Charge(order_id=1, amount=number))

    for number in range(len(lines)):
        hooked.delay(number, "documented")
    worker.drain()
    assert documented() == [(1, number) for number in range(len(lines))]
    assert len(lines) == 3


def test_the_documented_rule_for_loops(
    worker: InlineWorker, documented: Callable[[], Any], hook: Any
) -> None:
    """A step for each turn of a loop."""

    @hook("documented")
    def run(task: Any, value: Any) -> None:
        for order in (1, 2):
            with task.transaction(f"charge-{order}") as tx:
                tx.session.execute(insert(Charge).values(order_id=order, amount=5))

    hooked.delay(1, "documented")
    worker.drain()
    assert documented() == [(1, 5), (2, 5)]
