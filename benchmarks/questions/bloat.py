"""What tables and indexes hold after many tasks."""

from __future__ import annotations

from sqlalchemy import Connection, text

from benchmarks.peers import Lab, Peer
from benchmarks.plan import Plan
from benchmarks.records import Book
from tests.support.databases import autocommit

TITLE = "Tables and indexes after many tasks, bytes a task"

_SIZES = text("""
SELECT COALESCE(sum(pg_table_size(c.oid)), 0) AS tables,
       COALESCE(sum(pg_indexes_size(c.oid)), 0) AS indexes,
       COALESCE(sum(s.n_dead_tup), 0) AS dead,
       COALESCE(sum(s.n_tup_hot_upd), 0) AS hot, COALESCE(sum(s.n_tup_upd), 0) AS updates,
       COALESCE(sum(s.autovacuum_count), 0) AS vacuums
  FROM pg_class c JOIN pg_stat_user_tables s ON s.relid = c.oid
""")


#: Tasks in one go: an answer of the producer is waited for only so long.
_CHUNK = 100_000


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Plain tasks on all peers; members on ours: as run, vacuumed, and rewritten.

    A million plain tasks on ours, where there is time for it.
    """
    lab.stop_workers()
    count = plan.pick(full=100_000, short=5000, quick=500)
    for name in lab.chosen(("pgbarrier", "database", "django")):
        _run_plain(lab, book, name, count)
    if "pgbarrier" in lab.names:
        peer = lab.fresh()
        peer.call("chords", size=count, count=1)
        _note(book, peer, f"{count:,} members of a chord", count)
        lab.discard(peer)
        if count == _CHUNK:
            _run_plain(lab, book, "pgbarrier", 10 * _CHUNK)


def _run_plain(lab: Lab, book: Book, name: str, count: int) -> None:
    with book.guard(name):
        peer = lab.fresh(name)
        for start in range(0, count, _CHUNK):
            peer.call("flow", count=min(_CHUNK, count - start))
        _note(book, peer, f"{count:,} tasks", count)
        lab.discard(peer)


def _note(book: Book, peer: Peer, label: str, count: int) -> None:
    peer.stop_worker()
    assert peer.database
    with autocommit(peer.database) as connection:
        run = _sizes(connection)
        connection.exec_driver_sql("VACUUM FULL")
        packed = _sizes(connection)
    for part in ("tables", "indexes"):
        book.add(f"{label}: {part}", peer.name, "bytes", run[part] / count, base="pgbarrier")
        book.add(f"{label}: {part}, rewritten", peer.name, "bytes", packed[part] / count,
                 base="pgbarrier")  # fmt: skip
    share = 100 * run["hot"] / run["updates"] if run["updates"] else 0.0
    book.add(f"{label}: heap-only updates", peer.name, "%", share, base="pgbarrier")
    book.add(f"{label}: dead rows left", peer.name, "", run["dead"], base="pgbarrier")
    book.add(f"{label}: autovacuums", peer.name, "", run["vacuums"], base="pgbarrier")


def _sizes(connection: Connection) -> dict[str, float]:
    row = connection.execute(_SIZES).one()
    return {key: float(value) for key, value in row._mapping.items()}
