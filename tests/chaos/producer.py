"""A process that calls chords: ``python -m tests.chaos.producer CHORDS REPORT``.

``CHORDS`` is a JSON file; ``REPORT`` gets a line for each call that ended: its label, a blank, and
``returned`` or the error. A chord whose producer is to be hit is called in a fork of its own.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.chaos import tickets
from tests.chaos.chords import Chord
from tests.support.tasks import note
from tests.support.waiting import wait_until


def call(chord: Chord, report: str) -> None:
    """Call a chord and note how that ended."""
    threading.Event().wait(chord.pause)
    if chord.gate:
        wait_until(Path(chord.gate).exists, 240, f"{chord.label} may be called")
    if chord.where == "dispatch" and chord.ticket:
        tickets.arm(chord.ticket.encode())
    try:
        chord.signature()()
        note(report, f"{chord.label} returned")
    except Exception as error:
        note(report, f"{chord.label} {type(error).__name__}: {str(error)[:200]!r}")


def fork(chords: Iterable[Chord], report: str) -> None:
    """Call chords in a process of their own, and wait for its end."""
    pid = os.fork()
    if pid == 0:
        try:
            for chord in chords:
                call(chord, report)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def _warm(app: Any) -> None:
    """Do once what each fork would do again, short of connecting."""
    app.finalize()
    for module in ("kombu.transport.redis", "celery_pgbarrier.store.schema", "psycopg2"):
        importlib.import_module(module)
    Chord("warm", 2).signature().freeze()


def main(path: str, report: str) -> None:
    """Call the chords in order."""
    from tests.chaos.app import app

    app.set_default()
    _warm(app)
    chords = [Chord.decode(values) for values in json.loads(Path(path).read_text())]
    for _, some in itertools.groupby(chords, lambda c: c.label if c.where == "dispatch" else ""):
        fork(some, report)


if __name__ == "__main__":
    main(*sys.argv[1:])
