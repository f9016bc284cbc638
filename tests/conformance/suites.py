"""Celery's suites: fetched by version, each with an environment to run in."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
#: Inside the environment of the checkout, so that `make clean` removes it.
CACHE = CHECKOUT / ".venv/conformance"
PLUGIN = Path(__file__).parent / "plugin/pgbarrier_conformance.py"

VERSIONS = ("5.7.0", "5.6.3", "5.5.3")
#: Not ``test_backend``: it is about Azure's storage alone.
FILES = (
    "test_canvas",
    "test_tasks",
    "test_group_chains",
    "test_database_backend",
    "test_worker",
    "test_inspect",
    "test_serialization",
)

#: What Celery's suite imports, beside Celery with what these tests use of it.
REQUIREMENTS = ("pytest>=8.4,<9", "pytest-subtests", "pytest-timeout", "django")
EXTRAS = "msgpack,pydantic,redis,sqlalchemy,yaml"

PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


@dataclass(frozen=True)
class Suite:
    """The integration suite of one version of Celery."""

    version: str
    source: Path
    environment: Path

    @property
    def python(self) -> Path:
        """The interpreter that has this version of Celery and what its suite imports."""
        return self.environment / "bin/python"

    def has(self, file: str) -> bool:
        """Tell whether the suite has a file of this name (without ``.py``)."""
        return (self.source / f"t/integration/{file}.py").exists()


def prepare(version: str) -> Suite:
    """Return the suite of a version; what it needs is fetched the first time.

    Raises:
        subprocess.CalledProcessError: pip could not fetch or install something.
    """
    place = CACHE / f"celery-{version}-{_requirements_hash()}"
    suite = Suite(version, place / "source", place / "environment")
    complete = place / "complete"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several runs that start, one prepares
        if not complete.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            _unpack(version, place, suite.source)
            _install(version, suite)
            complete.touch()
    return suite


def _requirements_hash() -> str:
    """Return what tells environments with other requirements apart: this package's and ours."""
    metadata = ConfigParser()
    metadata.read(CHECKOUT / "setup.cfg")
    requirements = (metadata["options"]["install_requires"], EXTRAS, *REQUIREMENTS)
    return hashlib.sha256(" ".join(requirements).encode()).hexdigest()[:8]


def install_package(python: Path, target: Path) -> None:
    """Install the checkout's package and plugin, as they are now, into a folder of its own.

    The package is built from a copy: a build leaves files in the folder that it runs in.
    """
    with tempfile.TemporaryDirectory() as copy:
        for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(CHECKOUT / name, copy)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / "celery_pgbarrier", f"{copy}/celery_pgbarrier", ignore=ignored)
        _pip(python, "install", "--no-deps", "--target", str(target), copy)
    shutil.copy(PLUGIN, target)


def _unpack(version: str, place: Path, source: Path) -> None:
    """Fetch a source distribution and keep its tests and their configuration."""
    options = ["--no-deps", "--no-binary", "celery", "--dest", str(place)]
    _pip(Path(sys.executable), "download", *options, f"celery=={version}")
    archive = next(place.glob("celery-*.tar.gz"))
    with tarfile.open(archive) as tar:
        top = f"celery-{version}/"
        wanted = [
            member
            for member in tar.getmembers()
            if member.name.startswith(f"{top}t/") or member.name == f"{top}pyproject.toml"
        ]
        tar.extractall(place, wanted, filter="data")
    (place / top).rename(source)


def _install(version: str, suite: Suite) -> None:
    venv.create(suite.environment, with_pip=True)
    # Together with this package, for its dependencies; each run brings the package itself.
    celery = f"celery[{EXTRAS}]=={version}"
    _pip(suite.python, "install", celery, *REQUIREMENTS, f"{CHECKOUT}")
    _pip(suite.python, "uninstall", "--yes", "celery-pgbarrier")


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, *PIP, *arguments], check=True, stdout=subprocess.DEVNULL)
