"""Plans of what the reaper asks again and again: an index is searched, not read from end to end."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from celery_pgbarrier.store import sql
from celery_pgbarrier.store.sql import Statements
from celery_pgbarrier.store.sql.functions import FUNCTIONS
from tests.support.tables import Tables

VALUES: dict[str, Any] = {
    "limit": 1000,
    "grace": 1.0,
    "keep": 3600.0,
    "since": "-infinity",
    "until": "-infinity",
    "after": 60.0,
}

#: Statements by the column of the index that they are to search.
SEARCHED = {
    "TASKS_DUE": "due_at",
    "PURGE_BOUND": "expires_at",
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


#: Rows from one number to another of each table; a uuid that ends in a row's number.
_UUID = "CAST('00000000-0000-0000-0000-' || lpad(to_hex(n), 12, '0') AS uuid)"
_ROWS = "generate_series(:first, :last) AS n"
_FILLING = f"""
INSERT INTO pgbarrier_task
       (id, call, seq, barrier_id, slot, position, state, token, due_at, published_at)
SELECT 't' || n, {_UUID}, 1, CASE WHEN :member THEN 'b' || n / 4 END, mod(n, 4), mod(n, 4),
       :state, CASE WHEN :state = 'running' THEN {_UUID} END, now(), NULL
  FROM {_ROWS};
INSERT INTO pgbarrier_slot (barrier_id, slot, remaining)
SELECT 'b' || n / 4, mod(n, 4), 1 FROM {_ROWS};
INSERT INTO pgbarrier_barrier (id, call, size, open_slots, state, body)
SELECT 'b' || (n - 1), {_UUID}, 4, 1, 'ready', '' FROM {_ROWS};
INSERT INTO pgbarrier_worker (id, name, state) SELECT {_UUID}, 'w', 'running' FROM {_ROWS};
"""
_READ = """
SELECT sum(COALESCE(seq_tup_read, 0) + COALESCE(idx_tup_fetch, 0))
  FROM pg_stat_xact_user_tables WHERE relname LIKE 'pgbarrier%'
"""
_UUIDS = [str(uuid.UUID(int=number)) for number in (1, 2)]
_SAMPLES: dict[str, Any] = {
    "text": "t1", "uuid": _UUIDS[0], "integer": 1, "bigint": 1, "bytea": b"x",
    "double precision": 1.0, "boolean": True, "text[]": "{t1,t2}", "integer[]": "{1,1}",
    "uuid[]": f"{{{','.join(_UUIDS)}}}", "bytea[]": "{x,x}",
}  # fmt: skip
_NAMED = {
    "etas": "{NULL,NULL}", "barriers": "{b0,b0}", "barrier": "b0", "state": "waiting",
    "member_slots": "{1,2}", "positions": "{1,2}", "body_calls": _SAMPLES["uuid[]"],
}  # fmt: skip


@pytest.mark.parametrize("member", [False, True], ids=["alone", "member"])
@pytest.mark.parametrize("state", ["queued", "running", "done"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_was_planned_for_small_tables_reads_given_rows_only(
    name: str, state: str, member: bool, database_url: str
) -> None:
    """The plan is kept by the session, whatever the tables grow to."""
    function = FUNCTIONS[name]
    bound = {key: _NAMED.get(key, _SAMPLES[kind]) for key, kind in function.types.items()}
    if "barrier" in name:
        bound["id"] = "b1"
    call = text(Statements(None)[function.call].text)
    filling = {"state": state, "member": member}
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(_FILLING), {**filling, "first": 1, "last": 2})
        connection.execute(text("ANALYZE pgbarrier_task, pgbarrier_slot, pgbarrier_barrier"))
        connection.commit()
        for _ in range(3):
            connection.execute(call, bound)
            connection.rollback()
        connection.execute(text(_FILLING), {**filling, "first": 3, "last": 3000})
        connection.execute(call, bound)
        read = connection.execute(text(_READ)).scalar_one()
        connection.rollback()
    assert read < 100
