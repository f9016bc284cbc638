"""A network between two processes that can be cut: a TCP proxy on 127.0.0.1."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress

HOST = "127.0.0.1"


class Proxy:
    """Hands bytes on to a port of 127.0.0.1 until it is told otherwise.

    ``freeze()``: nothing passes, nobody is told. ``cut()``: every connection is closed, none is
    accepted. ``heal()`` ends either. A context manager.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._mode = "open"
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._mode = "frozen"

    def cut(self) -> None:
        self._mode = "cut"

    def heal(self) -> None:
        self._mode = "open"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._mode = "closed"
        # Wakes the thread that accepts, which closes what it made.
        with suppress(OSError):
            socket.create_connection((HOST, self.port), timeout=1).close()

    def _accept(self) -> None:
        with self._listener:
            while self._mode != "closed":
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self._mode in ("cut", "closed"):
                return
            with socket.create_connection((HOST, self._target), timeout=5) as server:
                self._pump(client, server)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        while self._mode not in ("cut", "closed"):
            if self._mode == "frozen":
                threading.Event().wait(0.02)
                continue
            for ready in select.select(list(other), [], [], 0.1)[0]:
                if self._mode == "open":
                    data = ready.recv(65536)
                    if not data:
                        return
                    other[ready].sendall(data)
