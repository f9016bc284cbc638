"""Plans of what the reaper asks again and again: an index is searched, not read from end to end."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from celery_pgbarrier.store import sql
from celery_pgbarrier.store.sql import Statements
from tests.support.tables import Tables

VALUES: dict[str, Any] = {
    "limit": 1000,
    "grace": 1.0,
    "keep": 3600.0,
    "since": "-infinity",
    "until": "-infinity",
    "most": 4000,
    "after": 60.0,
}

#: Statements by the column of the index that they are to search.
SEARCHED = {
    "TASKS_DUE": "due_at",
    "PURGE_BOUNDS": "expires_at",
    "PURGE_TASKS": "expires_at",
    "PURGE_UNLOCKED": "expires_at",
    "PURGE_GROUPS": "expires_at",
    "PURGE_POISON": "expires_at",
    "PURGE_EFFECTS": "created_at",
    "EXPIRED_BARRIER": "expires_at",
    "BARRIERS_READY": "ready_at",
    "BARRIERS_UNCHECKED": "checked_at",
}


def conditions(database_url: str, statement: str) -> list[str]:
    """What the indexes of a statement's plan are searched for."""
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.connect() as connection:
        # A small table is read from end to end whatever its indexes.
        connection.execute(text("SET LOCAL enable_seqscan = off"))
        connection.execute(text("SET LOCAL enable_bitmapscan = off"))
        clause = text("EXPLAIN " + Statements(None)[statement].text)
        bound = {name: VALUES[name] for name in clause.compile().params}
        plan = connection.execute(clause, bound).scalars().all()
    return [line.strip() for line in plan if "Index Cond" in line]


@pytest.mark.parametrize("name", SEARCHED)
def test_an_index_is_searched(name: str, tables: Tables, database_url: str) -> None:
    found = conditions(database_url, getattr(sql, name))
    assert any(f"({SEARCHED[name]} <" in line for line in found), found


def test_claims_of_lost_workers_are_found_among_those_of_healthy_ones(tables: Tables) -> None:
    workers = {state: str(uuid.uuid4()) for state in ("running", "stopping", "stopped", "dead")}
    for state, worker in workers.items():
        tables.ask(
            "INSERT INTO pgbarrier_worker (id, name, state)"
            " VALUES (CAST(:id AS uuid), :state, :state) RETURNING 1",
            id=worker, state=state,
        )  # fmt: skip
    for state, worker in {**workers, "unknown": str(uuid.uuid4())}.items():
        tables.ask(
            "INSERT INTO pgbarrier_task (id, state, worker, token)"
            " SELECT CAST(:name AS text) || n, 'running', CAST(:worker AS uuid),"
            " gen_random_uuid() FROM generate_series(1, 3) AS n RETURNING 1",
            name=state, worker=worker,
        )  # fmt: skip
    found = tables.ask(Statements(None)[sql.CLAIMS_LOST].text, limit=100)
    assert sorted((row.id, row.holder) for row in found) == sorted(
        (f"{name}{n}", holder)
        for name, holder in (("stopped", "stopped"), ("dead", "dead"), ("unknown", "dead"))
        for n in (1, 2, 3)
    )
    assert len(tables.ask(Statements(None)[sql.CLAIMS_LOST].text, limit=4)) == 4
