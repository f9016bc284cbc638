"""What is flushed: an outcome, and not a first claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, chord

from celery_pgbarrier.embedded import EmbeddedPostgres
from tests.support.brokers import Broker
from tests.support.inline import workers
from tests.support.tables import Tables
from tests.support.tasks import hooked, xsum

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]

#: Nobody else flushes in the time of a test.
QUIET = {
    "wal_writer_delay": "10s",
    "wal_writer_flush_after": "1GB",
    "autovacuum": "off",
    "checkpoint_timeout": "1d",
}


@pytest.fixture
def quiet() -> Iterator[Tables]:
    with EmbeddedPostgres(options=QUIET) as server:
        server.create_database("tests", "template0")
        yield Tables(server.backend_url("tests").removeprefix("pgbarrier+"))


def flushed_and_written(tables: Tables) -> tuple[int, int]:
    """How far the log is on disk, and how far it goes."""
    (row,) = tables.ask(
        "SELECT pg_current_wal_flush_lsn() - '0/0', pg_current_wal_insert_lsn() - '0/0'"
    )
    return int(row[0]), int(row[1])


@pytest.mark.parametrize("kind", ["alone", "member"])
def test_a_claim_is_not_flushed_and_an_outcome_is(
    quiet: Tables, make_app: Callable[..., Celery], redis_broker: Broker, hook: Hook, kind: str
) -> None:
    app = make_app(redis_broker, f"pgbarrier+{quiet.url}")
    seen: list[tuple[int, int]] = []

    @hook("looks")
    def looks(task: Any, value: Any) -> Any:
        seen.append(flushed_and_written(quiet))
        return value

    with workers(app, redis_broker) as make:
        worker = make()
        hooked.delay(0, "looks")
        worker.drain()  # tables are made, the worker is registered
        if kind == "member":
            chord([hooked.s(number, "looks") for number in range(3)], xsum.s()).delay()
        else:
            hooked.delay(1, "looks")
        before = flushed_and_written(quiet)
        worker.step()
        after = flushed_and_written(quiet)
    flushed, written = seen[-1]
    assert written > before[1], "the claim is in the log"
    assert flushed == before[0], "and it was not waited for"
    assert after[0] >= written, "the outcome is on disk, and the claim with it"
