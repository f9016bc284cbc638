"""What the embedded servers have in common: a folder, a port, a life."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TypeVar

from celery_pgbarrier.embedded.process import (
    POLL_SECONDS,
    User,
    alive,
    child_pids,
    spawn,
    state,
    wait_until,
)

HOST = "127.0.0.1"
# Below the ports that the kernel lends to outgoing connections: one of those could otherwise sit on
# a stopped server's port when it starts again.
PORTS = range(20_000, 32_000)
# What a server says when another process was quicker, or its predecessor is not quite gone.
TRY_AGAIN = ("address already in use", 'lock file "postmaster.pid" already exists')
MISSING = "{} was not found on this machine: pip install 'celery-pgbarrier[embedded]'"

AnyServer = TypeVar("AnyServer", bound="EmbeddedServer")


class EmbeddedServerError(RuntimeError):
    """An embedded server is missing, or did not do what it was told."""


class EmbeddedServer:
    """One server process, in one folder, on one port of 127.0.0.1."""

    name = "server"
    stop_signal = signal.SIGTERM
    death_signal = signal.SIGKILL

    def __init__(self, directory: Path | None, port: int | None) -> None:
        self.owns_directory = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix=f"pgbarrier-{self.name}-"))
        self.log = self.directory / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.user: User | None = None
        self._port = port
        self._port_is_settled = port is not None

    @property
    def port(self) -> int:
        if self._port is None:
            raise EmbeddedServerError(f"{self.name} has no port before start()")
        return self._port

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, timeout: float = 30.0) -> None:
        """Start, and return once a connection works: after ``stop()`` or ``kill()`` on the same
        folder and port. The EmbeddedServerError of a failure ends with the server's log."""
        if self.running:
            return
        deadline = time.monotonic() + timeout
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._prepare()
            log_size = self.log.stat().st_size if self.log.exists() else 0
            while not self._start_once(deadline, log_size):
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.kill()
            raise

    def stop(self, timeout: float = 15.0) -> None:
        """End the server and every connection to it, and wait until it is gone."""
        if self.process is not None and self.running:
            self.process.send_signal(self.stop_signal)
            self.resume()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """SIGKILL the server and its children, as in a crash, and wait until all are gone."""
        if self.process is not None and self.running:
            # A paused parent neither forks nor reaps: no child's id can pass to a stranger.
            self.pause()
            children = child_pids(self.process.pid)
            for pid in [*children, self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
            error = EmbeddedServerError(f"children of {self.name} do not end: {children}")
            wait_until(lambda: not alive(children), 10, error)

    def pause(self) -> None:
        """SIGSTOP the server's main process (the class says what clients notice)."""
        if self.process is not None:
            pid = self.process.pid
            self.process.send_signal(signal.SIGSTOP)
            error = EmbeddedServerError(f"{self.name} does not pause")
            wait_until(lambda: state(pid) in "TZ", 10, error)

    def resume(self) -> None:
        """Undo ``pause()``."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """``stop()``, and remove the folder if it is a temporary one."""
        self.stop()
        if self.owns_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self: AnyServer) -> AnyServer:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        """What a start needs beyond its folder."""

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether a client reaches this server and no stranger who listens on the port."""
        raise NotImplementedError

    def _start_once(self, deadline: float, log_size: int) -> bool:
        """False when another attempt is due, on another port if we have the choice."""
        if not self._port_is_settled:
            self._port = _free_port()
        self.process = self._spawn(self._command(), self.log)
        while self.running and time.monotonic() < deadline:
            if self._answers():
                self._port_is_settled = True
                return True
            time.sleep(POLL_SECONDS)
        said = self.log.read_bytes()[log_size:].decode(errors="replace")
        if time.monotonic() < deadline and any(words in said.lower() for words in TRY_AGAIN):
            return False
        what = "did not answer in time" if self.running else "ended"
        raise EmbeddedServerError(f"{self.name} on port {self._port} {what}:\n{said[-4000:]}")

    def _spawn(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        # PG* variables would lead a server astray; TRY_AGAIN is English.
        env = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        env["LC_ALL"] = "C"
        signals, place = self.death_signal, self.directory
        return spawn(command, log=log, death_signal=signals, user=self.user, cwd=place, env=env)


def _free_port() -> int:
    # Not the shared generator: test processes that seed it alike would all draw the same ports.
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise EmbeddedServerError(f"no free port in {PORTS}")
