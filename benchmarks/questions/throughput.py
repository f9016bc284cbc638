"""Plain tasks with stored results."""

from __future__ import annotations

import uuid

from benchmarks.peers import RESULTS, Lab
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "Tasks per second with stored results"


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """Tasks that wait in a queue are run; then tasks are run while they are being called."""
    count = plan.pick(full=3000, short=1500, quick=300)
    for peer in lab.turns(RESULTS, plan.rounds, plan.slow(plan.rounds)):
        with book.guard(peer.name):
            queue = f"{peer.broker.queue}-{uuid.uuid4().hex[:6]}"
            hostname = peer.worker.hostname
            found = peer.call("drain", count=count, queue=queue, worker=hostname)
            peer.drop_queue(queue)
            book.add("run from a full queue", peer.name, "/s", found["run"])
            book.add("called, nobody runs them", peer.name, "/s", found["publish"])
            book.add("called and run at once", peer.name, "/s", peer.call("flow", count=count))
