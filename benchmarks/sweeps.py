"""What sweeps cost, and what they spare others.

    python benchmarks/sweeps.py [--rows 300000] [--writers-only] [--url postgresql+psycopg2://...]

1. Rows per second of Purge, Expire and Revive beside one plain statement, a hand-written loop with
   OFFSET and one with ids read into Python; and the share of the time that is spent in this
   package (and SQLAlchemy), not waiting for PostgreSQL.
2. How long writers of the same table wait while 300,000 rows expire, beside one plain UPDATE; the
   longest transaction; the growth of this process.

It makes a database of its own on the server, and drops it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from celery import Celery

from celery_pgbarrier.sweeps import Expire, Purge, Revive, Rule

URL = "postgresql+psycopg2://postgres@127.0.0.1:5432/postgres"
BATCH = 1000

metadata = sa.MetaData()
objects = sa.Table(
    "objects",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("touched", sa.Integer, nullable=False),
    sa.Index("objects_by_state", "status", "id"),
)
STALE = (objects.c.status == "active") & (objects.c.seen_at < sa.func.now())
DEAD = objects.c.status == "active"


@contextmanager
def database(admin: str) -> Iterator[str]:
    """Give the URL of a new database."""
    name = f"pgbarrier_bench_{uuid.uuid4().hex[:8]}"
    engine = sa.create_engine(admin, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield sa.make_url(admin).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


def fill(engine: sa.Engine, rows: int) -> None:
    """Make *rows* stale objects, in a table without dead rows."""
    metadata.drop_all(engine)
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            sa.text("""
                INSERT INTO objects SELECT n, 'active', now() - interval '1 day',
                       repeat('x', 100), 0 FROM generate_series(1, :rows) AS n
            """),
            {"rows": rows},
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE objects")
        connection.exec_driver_sql("CHECKPOINT")


class Clock:
    """How much of a run is spent waiting for PostgreSQL, and its longest transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        self.waiting = self.longest = 0.0
        self._begun: dict[Any, float] = {}
        self._started = 0.0
        sa.event.listen(engine, "before_cursor_execute", self._start)
        sa.event.listen(engine, "after_cursor_execute", self._stop)
        sa.event.listen(engine, "begin", self._begin)
        sa.event.listen(engine, "commit", self._end)
        original = engine.dialect.do_commit

        def do_commit(connection: Any) -> None:
            self._start()
            original(connection)
            self._stop()

        engine.dialect.do_commit = do_commit  # type: ignore[method-assign]

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.waiting += time.perf_counter() - self._started

    def _begin(self, connection: Any) -> None:
        self._begun[connection] = time.perf_counter()

    def _end(self, connection: Any) -> None:
        length = time.perf_counter() - self._begun.pop(connection, time.perf_counter())
        self.longest = max(self.longest, length)


# -- what is compared


def plain_delete(engine: sa.Engine) -> int:
    with engine.begin() as connection:
        return connection.execute(sa.delete(objects).where(DEAD)).rowcount


def plain_update(engine: sa.Engine) -> int:
    with engine.begin() as connection:
        return connection.execute(sa.update(objects).where(STALE).values(status="stale")).rowcount


def by_hand(act: Callable[[list[int]], Any], condition: Any, moving: bool) -> Any:
    """Return the loop that reads ids into Python; *moving*: with an OFFSET, as is often seen."""

    def loop(engine: sa.Engine) -> int:
        done = offset = 0
        query = sa.select(objects.c.id).where(condition).order_by(objects.c.id).limit(BATCH)
        while True:
            with engine.begin() as connection:
                ids = list(connection.scalars(query.offset(offset)))
                if not ids:
                    return done
                done += connection.execute(act(ids)).rowcount
            offset += len(ids) if moving else 0

    return loop


def delete_ids(ids: list[int]) -> Any:
    return sa.delete(objects).where(objects.c.id.in_(ids))


def update_ids(ids: list[int]) -> Any:
    return sa.update(objects).where(objects.c.id.in_(ids)).values(status="stale")


def purge(batch_size: int, **options: Any) -> Callable[[sa.Engine], int]:
    sweep = Purge("bench", objects, where=DEAD, batch_size=batch_size, **options)
    return lambda engine: sweep.run(engine).rows


def expire(**options: Any) -> Callable[[sa.Engine], int]:
    values = {"status": "stale"}
    sweep = Expire("bench", objects, where=STALE, values=values, batch_size=BATCH, **options)
    return lambda engine: sweep.run(engine).rows


CONTENDERS: list[tuple[str, Callable[[sa.Engine], int]]] = [
    ("one plain DELETE", plain_delete),
    ("Purge, batches of 1,000", purge(1000)),
    ("Purge, batches of 100", purge(100)),
    ("Purge, 100, hook that does nothing", purge(100, before_delete=lambda row: None)),
    ("Purge, 100, mark and hook", purge(100, before_delete=bool, mark={"status": "purging"})),
    ("by hand, ids into Python, 1,000", by_hand(delete_ids, DEAD, moving=False)),
    ("by hand, moving OFFSET, 1,000", by_hand(delete_ids, DEAD, moving=True)),
    ("one plain UPDATE", plain_update),
    ("Expire, batches of 1,000", expire()),
    ("by hand, ids into Python, 1,000", by_hand(update_ids, STALE, moving=False)),
    ("by hand, moving OFFSET, 1,000", by_hand(update_ids, STALE, moving=True)),
]


def throughput(url: str, rows: int) -> None:
    """Print rows per second of each contender, and the share of it that is not PostgreSQL's."""
    print(f"\n{rows:,} rows of 150 bytes, two indexes\n")
    print(f"{'':38}{'rows/s':>9}{'skipped':>9}{'ours':>7}{'longest tx':>12}")
    for name, work in CONTENDERS:
        engine = sa.create_engine(url)
        fill(engine, rows)
        clock = Clock(engine)
        begun = time.perf_counter()
        done = work(engine)
        total = time.perf_counter() - begun
        ours = 1 - clock.waiting / total
        print(f"{name:38}{done / total:9,.0f}{rows - done:9,}{ours:7.0%}{clock.longest:10.3f} s")
        engine.dispose()


def revive(url: str, rows: int) -> None:
    """Print rows per second of Revive, to an in-memory broker: record, stamp, publish, mark."""
    app = Celery("bench", broker="memory://", backend=f"pgbarrier+{url}")
    engine = sa.create_engine(url)
    fill(engine, rows)
    rule = Rule("all", STALE, {"status": "queued"}, "bench.task", lambda row: (row.id,))
    sweep = Revive("revive", objects, rules=[rule], batch_size=500)
    begun = time.perf_counter()
    done = sweep.run(engine, app=app).rows
    print(f"\nRevive, batches of 500, broker in memory: {done / (time.perf_counter() - begun):,.0f}"
          " rows/s")  # fmt: skip
    engine.dispose()


# -- writers beside it


def write(url: str, rows: int, stop: Any, found: Any) -> None:
    """Update rows at random until told to stop.

    Sends back how long each update took (seconds), and how often one waited for a lock for longer
    than 100 ms: on a busy machine most of what is slow waits for a processor.
    """
    settings = {"options": "-c synchronous_commit=off -c lock_timeout=100ms"}
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", connect_args=settings)
    took: list[float] = []
    locked = 0
    with engine.connect() as connection:
        while not stop.wait(0.002):
            row = random.randint(1, rows)
            change = sa.update(objects).where(objects.c.id == row)
            change = change.values(touched=objects.c.touched + 1)
            begun = time.perf_counter()
            while not succeeds(connection, change):
                locked += 1
            took.append(time.perf_counter() - begun)
    engine.dispose()
    found.put((took, locked))


def succeeds(connection: sa.Connection, change: Any) -> bool:
    """Execute an update; False where it waited too long for a lock."""
    try:
        connection.execute(change)
    except sa.exc.OperationalError:
        return False
    return True


def beside_writers(url: str, rows: int, name: str, work: Callable[[sa.Engine], int]) -> None:
    """Print how long four writers' updates took while *work* was going on."""
    engine = sa.create_engine(url)
    fill(engine, rows)
    context = multiprocessing.get_context("spawn")
    stop, found = context.Event(), context.Queue()
    writers = [context.Process(target=write, args=(url, rows, stop, found)) for _ in range(4)]
    for writer in writers:
        writer.start()
    time.sleep(3)  # until all of them write
    clock, memory = Clock(engine), resident()
    begun = time.perf_counter()
    done = work(engine)
    total = time.perf_counter() - begun
    grown = resident() - memory
    stop.set()
    heard = [found.get() for _ in writers]
    took, locked = sorted(each for part, _ in heard for each in part), sum(n for _, n in heard)
    for writer in writers:
        writer.join()
    engine.dispose()
    cuts = statistics.quantiles(took, n=1000)
    over = sum(each > 0.1 for each in took)
    print(f"{name:26}{done:9,}{total:8.1f} s{clock.longest:9.3f} s{grown:7.1f} MB{len(took):9,}"
          f"{cuts[499] * 1e3:8.1f}{cuts[989] * 1e3:8.1f}{cuts[998] * 1e3:8.1f}"
          f"{took[-1] * 1e3:9.1f}{over:7}{locked:8}")  # fmt: skip


def resident() -> float:
    """Return this process's memory in MB (0 where /proc is not there)."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 / 1e6 if status.exists() else 0.0


def idle(engine: sa.Engine) -> int:
    """Do nothing for a while: what writers see without a sweep."""
    time.sleep(5)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=URL)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--throughput-rows", type=int, default=100_000)
    parser.add_argument("--writers-only", action="store_true")
    options = parser.parse_args()
    with database(options.url) as url:
        if not options.writers_only:
            throughput(url, options.throughput_rows)
            revive(url, min(20_000, options.throughput_rows))
        print(f"\nfour writers on a table of {options.rows:,} rows that expire; updates in ms\n")
        print(f"{'':26}{'rows':>9}{'took':>10}{'longest tx':>11}{'grown':>10}{'updates':>9}"
              f"{'p50':>8}{'p99':>8}{'p99.9':>8}{'max':>9}{'>100':>7}{'locked':>8}")  # fmt: skip
        for name, work in [
            ("nothing", idle),
            ("Expire", expire()),
            ("Expire, pause 20 ms", expire(pause=0.02)),
            ("one plain UPDATE", plain_update),
        ]:
            beside_writers(url, options.rows, name, work)


if __name__ == "__main__":
    main()
