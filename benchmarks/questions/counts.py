"""What a member costs the database, exactly."""

from __future__ import annotations

import redis

from benchmarks.database import Statistics
from benchmarks.peers import Lab, Peer
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "Statements, transactions, WAL bytes and rows written per member (dispatch included)"


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Two chords a peer, counted by the servers; whoever else uses the server adds to the WAL."""
    size = plan.pick(full=2000, short=1000, quick=200)
    for name in lab.chosen(("pgbarrier", "database", "django")):
        with book.guard(name):
            lab.peer(name).call("ping")
            _count(book, lab.peer(name), size)
    if "redis" in lab.names:
        _commands(book, lab, size)


def _count(book: Book, peer: Peer, size: int) -> None:
    assert peer.database
    statistics = Statistics(peer.database)
    statistics.settle()
    known, before = statistics.statements(), statistics.read()
    peer.call("chords", size=size, count=2)
    end = statistics.read()["wal"]
    statistics.settle()
    spent, members = statistics.read() - before, 2 * size
    for key in ("transactions", "inserted", "updated", "hot", "deleted"):
        book.add(f"{size:,}: {key}", peer.name, "", spent[key] / members, base="pgbarrier")
    wal = statistics.wal(before["wal"], end)
    records, pages = wal or (end - before["wal"], 0.0)
    book.add(f"{size:,}: WAL", peer.name, "bytes", records / members, base="pgbarrier")
    if wal:
        book.add(f"{size:,}: full pages", peer.name, "bytes", pages / members, base="pgbarrier")
    _statements(book, peer, statistics, known, members)


def _statements(
    book: Book, peer: Peer, statistics: Statistics,
    known: dict[str, dict[str, float]], members: int,
) -> None:  # fmt: skip
    found = statistics.statements()
    if not found:
        return
    total = 0.0
    lines = []
    for query, now in found.items():
        spent = {key: now[key] - known.get(query, {}).get(key, 0) for key in now}
        total += spent["calls"]
        if spent["calls"]:
            lines.append((spent["ms"], query, spent))
    book.add("statements, BEGIN and COMMIT among them", peer.name, "", total / members,
             base="pgbarrier")  # fmt: skip
    for _ms, query, spent in sorted(lines, reverse=True)[:12]:
        book.note(
            f"{peer.name}: {spent['calls'] / members:.3f} calls, "
            f"{spent['rows'] / members:.2f} rows, {spent['wal'] / members:,.0f} B WAL, "
            f"{spent['ms'] / members * 1000:,.0f} µs a member: {query}"
        )


def _commands(book: Book, lab: Lab, size: int) -> None:
    peer = lab.peer("redis")
    peer.call("ping")
    with redis.Redis.from_url(lab.redis) as client:
        before = client.info("stats")["total_commands_processed"]
        peer.call("chords", size=size, count=2)
        spent = client.info("stats")["total_commands_processed"] - before
    book.add(f"{size:,}: commands", "redis", "", spent / (2 * size))
