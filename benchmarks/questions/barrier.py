"""Members of one barrier that finish at once, in Python."""

from __future__ import annotations

import uuid

from benchmarks.peers import Lab
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "Members completed per second into one barrier, by Python processes"
PEERS = ("redis", "pgbarrier", "django", "redis-again")


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Celery's database backend does not count members: it polls."""
    size = plan.pick(full=3000, short=2000, quick=200)
    for processes in plan.pick(full=(1, 4, 16), short=(1, 4, 16), quick=(1, 4)):
        rounds = plan.pick(plan.rounds, 3, 1)
        for peer in lab.turns(PEERS, rounds, plan.slow(rounds)):
            with book.guard(peer.name):
                queue = f"{peer.broker.queue}-{uuid.uuid4().hex[:6]}"
                producer = peer.new_producer()
                try:
                    rate = producer.call("finish", size=size, processes=processes, queue=queue)
                finally:
                    producer.close()
                    peer.drop_queue(queue)
                    peer.drop_queue(f"{queue}-body")
                book.add(f"{processes} processes", peer.name, "/s", rate)
