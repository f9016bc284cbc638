"""Members of one barrier that finish at once, in SQL alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import uuid
from pathlib import Path

from sqlalchemy import make_url

from benchmarks.filling import multiply, tidy
from benchmarks.peers import Lab, Peer
from benchmarks.plan import Plan
from benchmarks.records import Book
from celery_pgbarrier.store import sql as statements
from tests.support.databases import autocommit

TITLE = "Members completed per second into one barrier, in SQL alone (pgbench)"

#: The next member of this client: clients take turns over the positions.
NEXT = "\\set i :i + 1\n\\set k (:i - 1) * :clients + :client_id\n"
ID = "'m:k'"
TOKEN = "md5('m:k')::uuid"
RESULT = "'\\x7b22737461747573223a202253554343455353222c2022726573756c74223a20317d'"

#: What the parameters of the statement that ends a member stand for.
VALUES = {
    "id": ID,
    "barrier": "'barrier'",
    "token": TOKEN,
    "write_token": "gen_random_uuid()",
    "status": "'SUCCESS'",
    "result": RESULT,
}

#: The limit: the same columns of the same rows, one commit each, and nothing counted.
ROWS = f"""
UPDATE pgbarrier_task SET state = 'done', status = 'SUCCESS', result = {RESULT}, token = NULL,
       last_token = gen_random_uuid(), worker = NULL, message = NULL, due_at = NULL,
       done_at = clock_timestamp()
 WHERE id = {ID} AND state = 'running' AND token = {TOKEN}
"""
#: What a naive barrier does: all members lock one row.
COUNTER = f"""
WITH done AS ({ROWS.strip()} RETURNING 1)
UPDATE bench_counter SET remaining = remaining - 1 FROM done RETURNING remaining
"""

RUNNING = """
UPDATE pgbarrier_task t SET id = 'm' || n.k, barrier_id = 'barrier', state = 'running', attempt = 1,
       token = md5('m' || n.k)::uuid, worker = gen_random_uuid(), due_at = NULL
  FROM (SELECT id, row_number() OVER (ORDER BY position) - 1 AS k
          FROM pgbarrier_task WHERE barrier_id IS NOT NULL) AS n
 WHERE t.id = n.id
"""
#: Members that a connection ends at most in one race.
MOST = 400
TABLES = ("barrier", "slot", "task")


def finish() -> str:
    """Our statement for the usual end of a member, with pgbench's variables for parameters."""

    def value(match: re.Match[str]) -> str:
        return VALUES[match[1]]

    return re.sub(r"(?<![:\w]):([a-z_]+)", value, statements.FINISH_MEMBER.replace("{s}", ""))


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Three statements take turns; each finishes all members of a barrier of its own."""
    program = shutil.which("pgbench")
    if program is None:
        raise FileNotFoundError("pgbench is not installed")
    lab.stop_workers()
    scripts = {"rows alone": ROWS, "counted by us": finish(), "one counter row": COUNTER}
    names, peers = list(scripts), {}
    for clients in plan.pick(full=(1, 4, 16, 64), short=(1, 4, 16, 64), quick=(1, 4)):
        size = plan.pick(full=200, short=100, quick=20) * max(clients, 16)
        if size not in peers:
            peers[size] = _open(lab, size)
        for number in range(plan.pick(plan.rounds, 3, 1)):
            for name in names[number % 3 :] + names[: number % 3]:
                _restore(peers[size])
                each = min(size // clients, MOST)
                rate = _race(program, peers[size], scripts[name], clients, each, lab.folder)
                _check(peers[size], size - clients * each, counted=name == "counted by us")
                book.add(f"{clients} connections", name, "/s", rate, base="rows alone")
    for peer in peers.values():
        lab.discard(peer)


def _open(lab: Lab, size: int) -> Peer:
    """One barrier whose members are all running, with ids and tokens that pgbench can make."""
    peer = lab.fresh()
    queue = f"{peer.broker.queue}-{uuid.uuid4().hex[:6]}"
    peer.producer.call("dispatch", size=size, queue=queue)
    peer.drop_queue(queue)
    peer.producer.close()
    assert peer.database
    with autocommit(peer.database) as connection:
        connection.exec_driver_sql(RUNNING)
        connection.exec_driver_sql("UPDATE pgbarrier_barrier SET id = 'barrier'")
        connection.exec_driver_sql("UPDATE pgbarrier_slot SET barrier_id = 'barrier'")
        for table in TABLES:
            connection.exec_driver_sql(f"CREATE TABLE kept_{table} AS TABLE pgbarrier_{table}")
        connection.exec_driver_sql(f"CREATE TABLE bench_counter AS SELECT {size} AS remaining")
    return peer


def _restore(peer: Peer) -> None:
    """Undo the last race, leaving tables without dead rows and nothing to be written."""
    assert peer.database
    with autocommit(peer.database) as connection:
        for table in TABLES:
            connection.exec_driver_sql(f"TRUNCATE pgbarrier_{table}")
            multiply(connection, f"pgbarrier_{table}", 1, {}, source=f"kept_{table}")
        connection.exec_driver_sql("VACUUM FULL bench_counter")
        tidy(connection)


def _race(program: str, peer: Peer, script: str, clients: int, each: int, folder: Path) -> float:
    assert peer.database
    url, path = make_url(peer.database), folder / "finish.sql"
    path.write_text(NEXT + " ".join(script.split()) + ";\n")
    command = [
        program, "--no-vacuum", f"--client={clients}", f"--jobs={min(clients, 2)}",
        f"--transactions={each}", f"--file={path}",
        "-D", "i=0", "-D", f"clients={clients}",
        "-h", str(url.host), "-p", str(url.port), "-U", str(url.username), str(url.database),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = re.search(r"tps = ([\d.]+) \(without", done.stdout)
    if done.returncode or not found:
        raise RuntimeError(f"pgbench: {done.stderr[-500:]}")
    return float(found[1])


def _check(peer: Peer, expected: int, counted: bool) -> None:
    """See that all members but ``expected`` have ended, and that the barrier knows it."""
    assert peer.database
    with autocommit(peer.database) as connection:
        left = connection.exec_driver_sql(
            "SELECT count(*) FROM pgbarrier_task WHERE state = 'running'"
        ).scalar()
        state = connection.exec_driver_sql("SELECT state FROM pgbarrier_barrier").scalar()
    assert left == expected, f"{left} members are left, not {expected}"
    assert not counted or (state == "ready") == (left == 0), f"{left} are left, it is {state}"
