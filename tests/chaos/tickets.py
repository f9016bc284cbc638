"""A ticket is a fault for one chord: at which point of the code, and what dies there.

Whoever carries it arms the point in its own process. The first process that passes the point
punches the ticket (makes its file) and dies, or waits until the campaign has killed a server.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from celery_pgbarrier import faults

#: The environment variable with the tickets that a process carries itself, as JSON.
VARIABLE = "CHAOS_TICKETS"

#: How long a process waits for the campaign's deed, seconds.
PATIENCE = 60.0

#: Deeds that the process does itself.
OWN_DEEDS: dict[str, Callable[[], None]] = {
    "child": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "producer": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "reaper": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "worker": lambda: os.killpg(os.getpgrp(), signal.SIGKILL),
    "pause": lambda: os.killpg(os.getpgrp(), signal.SIGSTOP),
}


#: Victims of which there is to be one at a time.
GATED = ("worker", "pause")


@dataclass(frozen=True)
class Ticket:
    """A fault point, the victim that is hit there, and the file that says that it was."""

    point: str
    victim: str
    path: str

    def encode(self) -> dict[str, str]:
        """As JSON, for a task's arguments."""
        return asdict(self)

    @property
    def punched(self) -> bool:
        return Path(self.path).exists()

    @property
    def process(self) -> tuple[int, int]:
        """The id and the group of the process that punched it."""
        pid, group = Path(self.path).read_text().split()
        return int(pid), int(group)

    @property
    def at(self) -> float:
        """When it was punched, seconds of the machine's clock."""
        return Path(self.path).stat().st_mtime

    @property
    def gate(self) -> str:
        """What its chord's call waits for: another worker must be there to take over."""
        return self.path + ".gate" if self.victim in GATED else ""

    def done(self) -> None:
        """Tell the waiting process that the deed is done."""
        Path(self.path + ".done").touch()


def arm(ticket: dict[str, Any] | None) -> None:
    """Arm this process with a ticket's point."""
    if ticket:
        faults.arm(ticket["point"], partial(punch, Ticket(**ticket)))


def disarm(ticket: dict[str, Any] | None) -> None:
    """Undo ``arm()``."""
    if ticket:
        faults.arm(ticket["point"], None)


def punch(ticket: Ticket) -> None:
    """Be the one who is hit; nothing happens where another process was."""
    mine = Path(f"{ticket.path}.{os.getpid()}")
    mine.write_text(f"{os.getpid()} {os.getpgrp()}")
    try:
        os.link(mine, ticket.path)  # whole when it appears
    except FileExistsError:
        return
    OWN_DEEDS.get(ticket.victim, partial(_wait, ticket))()


def _wait(ticket: Ticket) -> None:
    pause, done = threading.Event(), Path(ticket.path + ".done")
    for _ in range(int(PATIENCE / 0.02)):
        if done.exists():
            return
        pause.wait(0.02)
