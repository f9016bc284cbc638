"""Family: a parent, its children and their messages, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps import Family, Revive
from tests.support import databases
from tests.support.brokers import Broker
from tests.support.tables import Tables
from tests.sweeps.models import Batch, Item


def args(item: Any) -> tuple[int, int]:
    return (item.id, item.number)


family = Family(Batch, Item, link={Item.batch_id: Batch.id}, task="test.add", args=args)


def counted(engine: sa.Engine) -> tuple[int, int]:
    with engine.connect() as connection:
        return tuple(
            connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in (Batch, Item)
        )


def test_all_of_it(engine: sa.Engine, app: Celery, redis_broker: Broker) -> None:
    inserted = family.insert(app, {"state": "new"}, [{"number": n} for n in (1, 2, 3)])
    assert (inserted.parent.state, [item.number for item in inserted.children]) == (
        "new",
        [1, 2, 3],
    )
    assert {item.batch_id for item in inserted.children} == {inserted.parent.id}
    assert (counted(engine), redis_broker.depth(), len(inserted.task_ids)) == ((1, 3), 3, 3)


@pytest.mark.parametrize("given", [True, False], ids=["own engine", "the backend's"])
def test_a_failure_at_the_second_child_leaves_nothing(
    engine: sa.Engine, app: Celery, redis_broker: Broker, database_url: str, given: bool
) -> None:
    used = engine if given else None
    with pytest.raises(sa.exc.IntegrityError, match="number"):
        family.insert(app, {}, [{"number": 1}, {"number": -2}, {"number": 3}], used)

    def second_fails(item: Any) -> tuple[int]:
        if item.number == 2:
            raise LookupError("no such task")
        return (item.id,)

    failing = Family(Batch, Item, link={"batch_id": "id"}, task="test.identity", args=second_fails)
    with pytest.raises(LookupError):
        failing.insert(app, {}, [{"number": 1}, {"number": 2}], used)
    with pytest.raises(ValueError, match="without children"):
        family.insert(app, {}, [])
    assert (counted(engine), redis_broker.depth()) == ((0, 0), 0)
    assert Tables(database_url).count("task") == 0


def test_the_broker_is_down(
    engine: sa.Engine, make_app: Callable[..., Celery], database_url: str
) -> None:
    app = make_app(Broker("redis://127.0.0.1:1/0", "celery"), databases.backend_url(database_url))
    family.insert(app, {}, [{"number": 1}, {"number": 2}])
    assert counted(engine) == (1, 2)
    assert Tables(database_url).count("task", "published_at IS NULL") == 2


def test_parents_without_children_are_failed(engine: sa.Engine, app: Celery) -> None:
    with engine.begin() as connection:
        old = sa.func.now() - timedelta(hours=1)
        connection.execute(sa.insert(Batch).values(state="open", made_at=old))
        connection.execute(sa.insert(Batch).values(state="open"))
    family.insert(app, {"state": "open"}, [{"number": 1}])
    with engine.begin() as connection:
        connection.execute(sa.update(Batch).where(Batch.id == 3).values(made_at=old))
    rule = family.childless(
        lambda now: Batch.made_at < now - timedelta(minutes=10), {"state": "failed"}
    )
    counts = Revive("batches", Batch, rules=[rule]).run(engine)
    assert counts.rules == {"childless": 1}
    with engine.connect() as connection:
        states = connection.scalars(sa.select(Batch.state).order_by(Batch.id)).all()
    assert states == ["failed", "open", "open"]


def test_what_cannot_work_is_refused(bare_engine: sa.Engine, app: Celery) -> None:
    with pytest.raises(ConfigurationError, match="is in database"):
        family.insert(app, {}, [{"number": 1}], bare_engine)
    with pytest.raises(ConfigurationError, match="and a task"):
        Family(Batch, Item, link={"batch_id": "id"})
    with pytest.raises(ConfigurationError, match="did you mean 'batch_id'"):
        Family(Batch, Item, link={"batch": "id"}, task="x")
