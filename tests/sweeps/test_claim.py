"""Claim: one taker at a time, a lease, a limit of attempts."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.sweeps import Claim, Claimed
from tests.sweeps.models import Job


def make(**options: Any) -> Claim:
    given = {
        "state": Job.state,
        "free": ["queued"],
        "running": "running",
        "lease": Job.lease_until,
        "seconds": 60,
        "attempts": Job.attempts,
        "limit": 3,
        "gave_up": "failed",
        **options,
    }
    return Claim(Job, **given)


claim = make()


@pytest.fixture
def job(engine: sa.Engine) -> int:
    with engine.begin() as connection:
        return int(connection.scalar(sa.insert(Job.__table__).returning(Job.id)) or 0)


def take(engine: sa.Engine, job: int, by: Claim = claim) -> Claimed | None:
    with engine.begin() as connection:
        return by.take(connection, job)


def let_lease_run_out(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.update(Job).values(lease_until=sa.text("now() - interval '1 s'")))


def test_one_of_many_takes_it(engine: sa.Engine, job: int) -> None:
    gate, found = threading.Barrier(8), []

    def race() -> None:
        with engine.connect() as connection:
            gate.wait(10)
            found.append(claim.take(connection, job))
            connection.commit()

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (taken,) = [claimed for claimed in found if claimed]
    assert (taken.attempt, taken.row.state, len(found)) == (1, "running", 8)


def test_it_is_taken_again_when_the_lease_is_over(engine: sa.Engine, job: int) -> None:
    first = take(engine, job)
    assert first
    assert take(engine, job) is None
    let_lease_run_out(engine)
    second = take(engine, job)
    assert second
    assert second.attempt == 2
    with engine.begin() as connection:
        assert not claim.renew(connection, first)
        assert not claim.finish(connection, first, "done")
        assert claim.renew(connection, second)
        assert claim.finish(connection, second, "done", {"published_at": sa.func.now()})
        assert not claim.finish(connection, second, "done")
    assert take(engine, job) is None


def test_it_is_given_up_at_the_limit(engine: sa.Engine, job: int) -> None:
    for number in (1, 2, 3):
        claimed = take(engine, job)
        assert claimed
        assert claimed.attempt == number
        let_lease_run_out(engine)
    spent = take(engine, job)
    assert spent is not None
    assert (bool(spent), spent.given_up, spent.attempt) == (False, True, 3)
    assert (spent.row.state, spent.row.lease_until) == ("failed", None)
    assert take(engine, job) is None


def test_a_row_that_is_not_there_is_not_taken(engine: sa.Engine, job: int) -> None:
    assert take(engine, job + 1) is None


def test_further_values_are_set_with_a_grant(engine: sa.Engine, job: int) -> None:
    claimed = take(engine, job, make(values={"published_at": None, Job.id: Job.id + 100}))
    assert claimed
    assert claimed.row.id == job + 100


@pytest.mark.parametrize(
    ("options", "message"),
    [({"limit": 0}, "limit >= 1"), ({"state": "stat"}, "did you mean 'state'")],
)
def test_what_cannot_work_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**options)
