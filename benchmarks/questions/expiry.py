"""Expired results, deleted while others write."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import psycopg2
from sqlalchemy import Connection

from benchmarks.filling import multiply, tidy
from benchmarks.peers import Lab, Peer
from benchmarks.plan import Plan
from benchmarks.records import Book
from tests.support.databases import autocommit
from tests.support.services import libpq_url

TITLE = "Expiry of many results, beside one plain DELETE, and what a concurrent writer waits for"

ROWS = {"id": "'e' || g", "expires_at": "now() - interval '1 hour' + g * interval '1 microsecond'"}
DELETE = "DELETE FROM pgbarrier_task WHERE expires_at < now()"
#: A writer that waits longer than this for a lock says so (ms).
LOOK = 5


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """In turns; a thread keeps updating rows that expire."""
    lab.stop_workers()
    peer = lab.fresh()
    rows = plan.pick(full=1_000_000, short=1_000_000, quick=20_000)
    works: dict[str, Callable[[Peer, Connection], float]] = {
        "one plain DELETE": _delete,
        "pgbarrier": _purge,
    }
    assert peer.database
    peer.producer.call("store_one")
    for number in range(plan.pick(min(plan.rounds, 3), 3, 1)):
        for name in sorted(works, reverse=bool(number % 2)):
            with autocommit(peer.database) as connection:
                _fill(connection, rows)
                with Writer(libpq_url(peer.database), rows) as writer:
                    took = works[name](peer, connection)
                left = _left(connection)
                works[name](peer, connection)  # what the writer held is the next pass's
                assert _left(connection) == 0, "rows that have expired stay"
            book.add("left to the next pass", name, "rows", left, "max", base="one plain DELETE")
            _note(book, name, rows, took, writer)
    book.note(f"a longest lock wait of {LOOK} ms stands for: nobody waited longer than that")
    lab.discard(peer)


def _left(connection: Connection) -> int:
    expired = "SELECT count(*) FROM pgbarrier_task WHERE expires_at < now()"
    return int(connection.exec_driver_sql(expired).scalar() or 0)


def _note(book: Book, name: str, rows: int, took: float, writer: Writer) -> None:
    base = "one plain DELETE"
    book.add(f"{rows:,} rows: results deleted", name, "/s", rows / took, base=base)
    book.add("longest lock wait of the writer", name, "s", writer.longest, "max", base=base)
    book.add("slowest update of the writer", name, "s", writer.slowest, "max", base=base)
    book.add("updates meanwhile", name, "/s", writer.count / took, base=base)


def _fill(connection: Connection, rows: int) -> None:
    connection.exec_driver_sql("DELETE FROM pgbarrier_task WHERE id <> 'seed'")
    connection.exec_driver_sql("VACUUM FULL pgbarrier_task")
    multiply(connection, "pgbarrier_task", rows, ROWS)
    tidy(connection)


def _delete(_: Peer, connection: Connection) -> float:
    begun = time.perf_counter()
    connection.exec_driver_sql(DELETE)
    return time.perf_counter() - begun


def _purge(peer: Peer, _: Connection) -> float:
    return float(peer.producer.call("cleanup"))


class Writer:
    """A thread that updates rows at random while a block runs."""

    def __init__(self, url: str, rows: int) -> None:
        self.slowest, self.count = 0.0, 0
        self.longest = LOOK / 1000
        self._url, self._rows = url, rows
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(120)

    def _write(self) -> None:
        options = f"-c synchronous_commit=off -c lock_timeout={LOOK}ms"
        connection = psycopg2.connect(self._url, options=options)
        connection.autocommit = True
        cursor = connection.cursor()
        while not self._done.wait(0.005):
            begun, waited = time.perf_counter(), False
            row = f"e{random.randint(1, self._rows)}"
            while not self._update(cursor, row):
                waited = True
            took = time.perf_counter() - begun
            self.slowest, self.count = max(self.slowest, took), self.count + 1
            if waited:
                self.longest = max(self.longest, took)
        connection.close()

    def _update(self, cursor: psycopg2.extensions.cursor, row: str) -> bool:
        try:
            cursor.execute("UPDATE pgbarrier_task SET status = status WHERE id = %s", (row,))
        except psycopg2.errors.LockNotAvailable:
            return False
        return True
