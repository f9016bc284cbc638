"""One very large chord, run to its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from benchmarks.peers import Lab, Peer
from benchmarks.plan import Plan
from benchmarks.records import Book

TITLE = "A very large chord from its call to its body: time, memory, size of the body's message"


def run(lab: Lab, plan: Plan, book: Book) -> None:
    """The worker's processes and the producer are looked at twice a second."""
    size = plan.pick(full=100_000, short=100_000, quick=1000)
    names = plan.pick(full=("pgbarrier", "redis"), short=("pgbarrier",), quick=("pgbarrier",))
    lab.stop_workers()
    for name in lab.chosen(names):
        with book.guard(name):
            _run(lab, book, lab.fresh(name), size)


def _run(lab: Lab, book: Book, peer: Peer, size: int) -> None:
    peer.call("ping")
    lab.told("body-bytes")
    with _watched(peer) as peaks:
        (found,) = peer.call("chords", size=size)
    for label, key in (("the call", "call"), ("call to body", "total"), ("last member", "last")):
        book.add(f"{size:,}: {label}", peer.name, "s", found[key])
    for label, peak in peaks.items():
        book.add(f"{size:,}: peak memory of {label}", peer.name, "MB", peak)
    book.add(f"{size:,}: message of the body", peer.name, "bytes", max(lab.told("body-bytes")))
    peer.stop_worker()


@contextmanager
def _watched(peer: Peer) -> Iterator[dict[str, float]]:
    """The largest resident sizes (MB) of a peer's processes while the block runs."""
    peaks: dict[str, float] = {}
    done = threading.Event()

    def note(label: str, process: psutil.Process) -> None:
        peaks[label] = max(peaks.get(label, 0.0), process.memory_info().rss / 2**20)

    def watch() -> None:
        while not done.wait(0.5):
            note("the producer", psutil.Process(peer.producer.pid))
            note("the worker's parent", psutil.Process(peer.worker.pid))
            for pid in peer.worker.children():
                note("the largest child", psutil.Process(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
