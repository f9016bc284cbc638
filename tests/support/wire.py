"""The line between a client and PostgreSQL: what was said, and a cut at a chosen moment."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from types import TracebackType

from sqlalchemy import make_url


class Wire:
    """A proxy in front of a PostgreSQL server.

    ``said`` lists the messages of the simple and of the extended query protocol that clients sent,
    as text: one entry is one round trip.

    ``cut(words)`` lets the next message with these whole words reach the server, and breaks the
    connection instead of returning the answer: the client cannot know what happened. With
    ``stay=True`` no connection gets through any more until :meth:`mend`.
    """

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self._server = (parsed.host or "127.0.0.1", parsed.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        port = self._listener.getsockname()[1]
        changed = parsed.set(host="127.0.0.1", port=port)
        # The proxy reads the protocol, which neither TLS nor GSSAPI lets it.
        changed = changed.update_query_dict({"sslmode": "disable", "gssencmode": "disable"})
        self.url = changed.render_as_string(hide_password=False)
        self.said: list[str] = []
        self._cut: tuple[re.Pattern[str], bool] | None = None
        self._closed = threading.Event()
        self._down = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self, words: str, stay: bool = False) -> None:
        """Lose the answer to the next message that contains *words*."""
        self._cut = (re.compile(rf"(?<!\w){re.escape(words)}(?!\w)"), stay)

    def break_off(self) -> None:
        """Break every connection, and let none through until :meth:`mend`."""
        self._down.set()
        for end in list(self._sockets):
            self._hang_up(end)

    def mend(self) -> None:
        """Let connections through again."""
        self._down.clear()

    @property
    def was_cut(self) -> bool:
        """Whether the cut that was asked for has happened."""
        return self._cut is None

    def close(self) -> None:
        """Break every connection and end."""
        self._closed.set()
        for end in list(self._sockets):
            self._hang_up(end)
        for thread in self._threads:
            thread.join(5)
        self._listener.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if self._down.is_set():
                client.close()
                continue
            client.settimeout(None)
            server = socket.create_connection(self._server, timeout=10)
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets.add(end)
            talk = _Talk(self, client, server)
            for target in (talk.listen, talk.answer):
                thread = threading.Thread(target=target, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _hang_up(self, end: socket.socket) -> None:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
        self._sockets.discard(end)


class _Talk:
    """One connection, in both directions."""

    def __init__(self, wire: Wire, client: socket.socket, server: socket.socket) -> None:
        self.wire, self.client, self.server = wire, client, server
        self.muted = False

    def listen(self) -> None:
        """Pass on what the client says, message by message."""
        buffer, started = b"", False
        try:
            while data := self.client.recv(65536):
                buffer += data
                while True:
                    head = 1 if started else 0  # the first message has no type byte
                    if len(buffer) < head + 4:
                        break
                    size = head + int.from_bytes(buffer[head : head + 4], "big")
                    if len(buffer) < size:
                        break
                    message, buffer = buffer[:size], buffer[size:]
                    self._pass_on(message, started)
                    started = True
        except OSError:
            pass
        finally:
            self.wire._hang_up(self.server)

    def _pass_on(self, message: bytes, started: bool) -> None:
        if started and message[:1] in b"QP":  # Query, Parse
            text = message[5:].strip(b"\0").decode(errors="replace")
            self.wire.said.append(text)
            cut = self.wire._cut
            if cut is not None and cut[0].search(text):
                self.wire._cut, self.muted = None, True
                if cut[1]:
                    self.wire._down.set()
        self.server.sendall(message)

    def answer(self) -> None:
        """Pass on what the server says, unless this answer is to be lost."""
        try:
            while data := self.server.recv(65536):
                if self.muted:
                    break
                self.client.sendall(data)
        except OSError:
            pass
        finally:
            self.wire._hang_up(self.client)
            if self.muted and self.wire._down.is_set():
                for end in list(self.wire._sockets):
                    self.wire._hang_up(end)
