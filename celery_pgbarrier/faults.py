"""Named fault points: no-ops in production, armed by tests through the environment.

``PGBARRIER_FAULTS="point=action[@file];..."`` arms points.  Actions: ``kill`` (SIGKILL to the own
process), ``exit`` (``os._exit(1)``), ``stop`` (SIGSTOP to the own process), ``raise`` (an
:class:`InjectedFault`).  With ``@file`` a point fires once: whoever creates the file fires.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

__all__ = ["InjectedFault", "POINTS", "arm", "point"]

VARIABLE = "PGBARRIER_FAULTS"

#: Every point that the code passes, with what has just happened there.
POINTS = {
    "dispatch.captured": "all messages of a chord are captured, nothing is committed",
    "dispatch.committed": "a chord is committed, nothing is published",
    "dispatch.half-published": "the first of a chord's messages is published",
    "claim.granted": "a claim is committed, the body has not begun",
    "body.returned": "the body has returned, nothing of it is stored",
    "effect.committing": "all of a self.transaction() is written, its COMMIT is not sent",
    "effect.committed": "a self.transaction() is committed, its messages are not published",
    "finish.committed": "an outcome is committed, its continuation is not published",
    "release.committed": "a barrier is released, its body is not published",
    "reap.advanced": "the reaper has taken messages up, none is published",
    "reap.released": "the reaper has released a claim, its message is not published",
}


class InjectedFault(RuntimeError):
    """Raised at a point that is armed with ``raise``."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit() -> None:
    os._exit(1)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise() -> None:
    raise InjectedFault("injected by a test")


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "exit": _exit,
    "stop": _stop,
    "raise": _raise,
}


def _parse(spec: str) -> dict[str, tuple[Callable[[], None], str | None]]:
    armed = {}
    for entry in filter(None, spec.split(";")):
        name, _, rest = entry.partition("=")
        action, _, path = rest.partition("@")
        if name not in POINTS or action not in _ACTIONS:
            raise ValueError(f"{VARIABLE}: no such fault {entry!r}")
        armed[name] = (_ACTIONS[action], path or None)
    return armed


_armed = _parse(os.environ.get(VARIABLE, ""))


def arm(name: str, action: Callable[[], None] | None) -> None:
    """Arm the fault point *name* of this process with an action of a test's own; None disarms it.

    Raises:
        ValueError: there is no such point.
    """
    if name not in POINTS:
        raise ValueError(f"no such fault point {name!r}: one of {', '.join(POINTS)}")
    if action is None:
        _armed.pop(name, None)
    else:
        _armed[name] = (action, None)


def point(name: str) -> None:
    """Pass the fault point *name*; does nothing unless a test armed it."""
    if not _armed or name not in _armed:
        return
    action, path = _armed[name]
    if path is not None:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    action()
