"""``docs/guarantees.md`` names only tests and scenarios that there are."""

from __future__ import annotations

import re
from pathlib import Path

from tests.chaos.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
#: An en dash.
NONE = "\u2013"


def rows() -> list[list[str]]:
    """The rows of the crash tables, cell by cell."""
    text = (ROOT / "docs" / "guarantees.md").read_text()
    part = text.split("## What can die", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines if "---" not in cells[0]]


def named(column: int) -> set[str]:
    """What the rows name in a column, headings apart."""
    names = {name.strip(" `") for cells in rows() for name in cells[column].split(",")}
    return names - {"test", "scenario", NONE}


def without_hazard(name: str) -> str:
    """A test's name without the number of the hazard that it is about."""
    return re.sub(r"hazard_\d+_(and_\d+_)?", "", name)


def test_the_tests_of_the_crash_table_exist() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    there = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    assert len(named(4)) > 20
    assert {without_hazard(name) for name in named(4)} - set(map(without_hazard, there)) == set()


def test_the_scenarios_of_the_crash_table_exist() -> None:
    assert len(named(5)) > 20
    assert named(5) - set(SCENARIOS) == set()


def test_every_row_is_shown_by_something() -> None:
    assert [cells[0] for cells in rows() if cells[4] == cells[5] == NONE] == []
