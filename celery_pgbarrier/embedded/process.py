"""Child processes that do not outlive their parent, and a look at the process table (POSIX)."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["POLL_SECONDS", "User", "alive", "child_pids", "spawn", "state", "wait_until"]

POLL_SECONDS = 0.02
PR_SET_PDEATHSIG = 1
GONE = "Z"  # a zombie does nothing any more, whether or not its parent takes notice

User = tuple[int, int]  # uid, gid


def spawn(
    command: Sequence[str | Path],
    *,
    log: Path,
    death_signal: signal.Signals = signal.SIGKILL,
    user: User | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``command`` in a process group of its own, its output appended to ``log``.

    The child gets ``death_signal`` when the calling *thread* or its process dies (Linux only), and
    runs as ``user`` when one is given. Ctrl-C in a terminal does not reach it.
    """
    # A launcher that execs, not preexec_fn, which may deadlock in a process with threads.
    launcher = [sys.executable, "-I", "-S", __file__]
    circumstances = [int(death_signal), os.getpid(), *(user or (-1, -1))]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*launcher, *map(str, circumstances), *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env,
        )


def child_pids(parent: int) -> list[int]:
    """The ids of a process's direct children, also of dead ones that it has not reaped."""
    return [pid for pid, (ppid, _) in _processes().items() if ppid == parent]


def alive(pids: Iterable[int]) -> list[int]:
    """Those of the given processes that have not ended."""
    processes = _processes()
    return [pid for pid in pids if processes.get(pid, (0, GONE))[1] != GONE]


def state(pid: int) -> str:
    """The state letter of a process as ``ps`` shows it; Z when there is none."""
    return _processes().get(pid, (0, GONE))[1]


def wait_until(true: Callable[[], object], seconds: float, otherwise: Exception) -> None:
    """Poll until ``true()`` holds; raise ``otherwise`` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise otherwise
        time.sleep(POLL_SECONDS)


def _processes() -> dict[int, tuple[int, str]]:
    """Parent and state letter of every process, by id."""
    if sys.platform != "linux":
        table = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid=,state="], text=True)
        rows = (line.split() for line in table.splitlines())
        return {int(pid): (int(ppid), state[0]) for pid, ppid, state in rows}
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name before these, in parentheses, may hold anything.
            letter, ppid = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue
        found[int(stat.parent.name)] = (int(ppid), letter)
    return found


def _become(death_signal: int, parent: int, uid: int, gid: int, *, command: list[str]) -> None:
    """Turn this process into ``command``, tied to the life of the process that started it."""
    os.setpgid(0, 0)
    if uid >= 0:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if sys.platform == "linux":
        # After the change of user, which clears it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit("the process that started this one is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(*map(int, sys.argv[1:5]), command=sys.argv[5:])
