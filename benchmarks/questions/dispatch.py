"""One very large chord, called."""

from __future__ import annotations

import uuid

from benchmarks.peers import Lab
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "Dispatch of a very large chord: time and peak memory of the caller"


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Each call is made by a new process, into a queue that nobody consumes."""
    size = plan.pick(full=100_000, short=100_000, quick=2000)
    peers = plan.pick(
        full=("redis", "pgbarrier", "database", "django"),
        short=("redis", "pgbarrier"),
        quick=("redis", "pgbarrier", "database", "django"),
    )
    lab.stop_workers()
    for peer in lab.turns(peers, plan.pick(min(plan.rounds, 2), 1, 1)):
        queue = f"{peer.broker.queue}-{uuid.uuid4().hex[:6]}"
        producer = peer.new_producer()
        with book.guard(peer.name):
            try:
                found = producer.call("dispatch", size=size, queue=queue)
            finally:
                producer.close()
                peer.drop_queue(queue)
            book.add(f"{size:,}: the call", peer.name, "s", found["seconds"])
            book.add(f"{size:,}: peak memory", peer.name, "MB", found["peak"])
            book.add(f"{size:,}: memory before the call", peer.name, "MB", found["before"])
