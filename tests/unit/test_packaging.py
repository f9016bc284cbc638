"""The package's metadata, and the rules that keep its parts apart."""

from __future__ import annotations

import sys
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import celery_pgbarrier

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("celery.result_backends", "celery_pgbarrier.backend:BarrierBackend"),
        ("celery.commands", "celery_pgbarrier.cli:pgbarrier"),
    ],
)
def test_celery_finds_us_by_entry_point(group: str, target: str) -> None:
    found = {entry.value: entry for entry in entry_points(group=group, name="pgbarrier")}
    assert list(found) == [target]
    assert found[target].load() is not None


def test_version_is_declared_once_and_shown() -> None:
    assert celery_pgbarrier.__version__ == distribution("celery-pgbarrier").version


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_python_versions(python: str) -> None:
    metadata = distribution("celery-pgbarrier").metadata
    assert python in SpecifierSet(metadata["Requires-Python"])
    assert f"Programming Language :: Python :: {python}" in metadata.get_all("Classifier")


def test_older_python_is_refused() -> None:
    assert "3.9" not in SpecifierSet(distribution("celery-pgbarrier").metadata["Requires-Python"])


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("celery", ["5.5.0", "5.6.1", "5.7.0"], ["5.4.0", "5.8.0"]),
        ("sqlalchemy", ["2.0.10", "2.1.9"], ["1.4.54", "2.0.9", "3.0"]),
    ],
)
def test_versions_of_what_we_build_on(name: str, accepted: list[str], refused: list[str]) -> None:
    needed = [Requirement(line) for line in distribution("celery-pgbarrier").requires or ()]
    (requirement,) = [r for r in needed if r.name.lower() == name and r.marker is None]
    assert all(version in requirement.specifier for version in accepted)
    assert not any(version in requirement.specifier for version in refused)


def test_servers_for_tests_are_no_runtime_dependency() -> None:
    needed = [Requirement(line) for line in distribution("celery-pgbarrier").requires or ()]
    always = {r.name.lower() for r in needed if r.marker is None or "extra" not in str(r.marker)}
    assert always == {"alembic", "celery", "psycopg2-binary", "sqlalchemy"}


def test_every_module_stands_in_a_band() -> None:
    importlinter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert importlinter["root_package"] == "celery_pgbarrier"
    (bands,) = [contract for contract in importlinter["contracts"] if contract["type"] == "layers"]
    placed = {name.strip(" ()") for band in bands["layers"] for name in band.split(":")}
    package = Path(celery_pgbarrier.__file__).parent
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    assert placed == modules | packages
