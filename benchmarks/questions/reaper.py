"""What a pass of the reaper costs among a million rows."""

from __future__ import annotations

import uuid

from sqlalchemy import Connection

from benchmarks.filling import multiply, tidy
from benchmarks.peers import Lab, Peer
from benchmarks.plan import Plan
from benchmarks.records import Book
from tests.support.databases import autocommit

TITLE = "A pass of the reaper over many rows"

#: Of 1,000 members half have finished and half wait, overdue tomorrow; barriers are open.
ROWS = {
    "id": "t.id || '-' || g",
    "barrier_id": "CASE WHEN mod(t.position, 2) = 0 THEN t.barrier_id || '-' || g END",
    "state": "CASE WHEN mod(t.position, 2) = 0 THEN t.state ELSE 'done' END",
    "status": "CASE WHEN mod(t.position, 2) = 0 THEN t.status ELSE 'SUCCESS' END",
    "message": "CASE WHEN mod(t.position, 2) = 0 THEN t.message END",
    "result": "CASE WHEN mod(t.position, 2) = 1 THEN convert_to(repeat('r', 120), 'UTF8') END",
    "due_at": "CASE WHEN mod(t.position, 2) = 0 THEN now() + interval '1 day' END",
    "done_at": "CASE WHEN mod(t.position, 2) = 1 THEN now() END",
    "expires_at": "CASE WHEN mod(t.position, 2) = 1 THEN now() + interval '1 day' END",
}
CLONE = {"id": "t.id || '-' || g", "barrier_id": "t.barrier_id || '-' || g"}

#: 1,000 messages whose publisher died.
OVERDUE = """
UPDATE pgbarrier_task SET due_at = now() - interval '1 hour', published_at = NULL
 WHERE id IN (SELECT id FROM pgbarrier_task WHERE state = 'queued' LIMIT 1000)
"""
#: 1,000 claims of a worker that is dead.
LOST = """
WITH dead AS (INSERT INTO pgbarrier_worker (id, name, state)
              VALUES (gen_random_uuid(), 'gone', 'dead') RETURNING id)
UPDATE pgbarrier_task SET state = 'running', worker = (SELECT id FROM dead), attempt = 1,
       token = gen_random_uuid(), due_at = NULL
 WHERE id IN (SELECT id FROM pgbarrier_task WHERE state = 'queued' LIMIT 1000)
"""
#: What healthy workers hold.
HELD = """
UPDATE pgbarrier_task SET state = 'running', token = gen_random_uuid(), attempt = 1,
       worker = (SELECT id FROM pgbarrier_worker LIMIT 1), due_at = NULL
 WHERE id IN (SELECT id FROM pgbarrier_task WHERE state = 'queued' LIMIT 100)
"""


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Each statement of a pass is explained once, then passes are timed."""
    lab.stop_workers()
    peer = lab.fresh()
    queue = f"{peer.broker.queue}-{uuid.uuid4().hex[:6]}"
    peer.producer.call("dispatch", size=1000, queue=queue)
    peer.producer.call("beat")
    assert peer.database
    with autocommit(peer.database) as connection:
        rows = _fill(connection, plan.pick(full=1000, short=1000, quick=10))
        _ask(book, peer, f"{rows:,} live rows, nothing stale", repeat=plan.pick(9, 5, 3))
        for label, make in (("overdue messages", OVERDUE), ("claims of the dead", LOST)):
            connection.exec_driver_sql(make)
            connection.exec_driver_sql("ANALYZE pgbarrier_task")
            _ask(book, peer, f"{rows:,} live rows, 1,000 {label}", repeat=1)
    peer.drop_queue(queue)
    lab.discard(peer)


def _fill(connection: Connection, times: int) -> int:
    for table in ("pgbarrier_barrier", "pgbarrier_slot"):
        multiply(connection, table, times, CLONE)
    multiply(connection, "pgbarrier_task", times, ROWS)
    connection.exec_driver_sql(HELD)
    tidy(connection)
    count = connection.exec_driver_sql("SELECT count(*) FROM pgbarrier_task").scalar()
    assert isinstance(count, int)
    return count


def _ask(book: Book, peer: Peer, label: str, repeat: int) -> None:
    if repeat > 1:
        plans = peer.producer.call("explain_reap")
        for plan in sorted(plans, key=lambda each: -float(each["ms"]))[:8]:
            scans = "".join(f", {name} READ FROM END TO END" for name in plan["sequential"])
            cost = f"{plan['ms']:.2f} ms, {plan['buffers']:,} buffers{scans}"
            book.note(f"{cost}: {plan['statement']}")
        scanned = {name for plan in plans for name in plan["sequential"]}
        book.add(
            f"{label}: tables or indexes read from end to end", "pgbarrier", "", float(len(scanned))
        )
    for _ in range(repeat):
        found = peer.producer.call("reap")
        book.add(f"{label}: statements", "pgbarrier", "s", found["database"])
        book.add(f"{label}: the whole pass", "pgbarrier", "s", found["seconds"])
    book.note(f"{label}: {found['counts']}")
