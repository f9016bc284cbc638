"""PgBouncer in transaction mode, between a test session and its PostgreSQL server."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

from sqlalchemy import make_url

from tests.support.waiting import wait_until

#: Where distributions put it, which is not on everybody's path.
PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

INI = """
[databases]
* = host={host} port={port} user={user}{password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = transaction
max_client_conn = 2000
default_pool_size = 20
server_idle_timeout = 3
log_connections = 0
log_disconnections = 0
"""


def find() -> str | None:
    """The path of PgBouncer's program, None where it is not installed."""
    return shutil.which("pgbouncer", path=PLACES)


def through(url: str, pooler: str | None) -> str:
    """The same database through the pooler that listens at ``host:port``."""
    if pooler is None:
        return url
    host, _, port = pooler.partition(":")
    return make_url(url).set(host=host, port=int(port)).render_as_string(hide_password=False)


@contextmanager
def running(program: str, server: str) -> Iterator[str]:
    """Run PgBouncer in front of a server; yields its ``host:port``.

    It refuses to run as root, and is then run as ``nobody``.
    """
    url = make_url(server)
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="pgbarrier-pgbouncer-") as folder:
        path = Path(folder, "pgbouncer.ini")
        password = f" password={url.password}" if url.password else ""
        path.write_text(
            INI.format(
                host=url.host or "127.0.0.1", port=url.port or 5432,
                user=url.username or "postgres", password=password, listen=port,
            )
        )  # fmt: skip
        os.chmod(folder, 0o755)
        path.chmod(0o644)
        lower = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}
        with Path(folder, "log").open("wb") as log:
            process = Popen([program, "--quiet", str(path)], stderr=log, **lower)  # type: ignore[call-overload]
        try:
            wait_until(lambda: _answers(port), 10, Path(folder, "log").read_text)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait(10)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
