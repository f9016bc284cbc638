"""A short selection of the campaign: as it is run by ``make chaos``, with fewer chords."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from celery_pgbarrier.faults import POINTS
from tests.chaos import plan
from tests.chaos.arena import Arena
from tests.chaos.kinds import KINDS
from tests.chaos.run import run
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.stage import chance

SEED = os.environ.get("PGBARRIER_TEST_SEED", "1")
CHORDS = 8


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(KINDS["ours"]) as arena:
        yield arena


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["body.returned:child", "dispatch.half-published:producer", "duplicates"]
)
def test_our_backend_keeps_its_promises(arena: Arena, name: str, tmp_path: Path) -> None:
    result = run(arena, SCENARIOS[name], SEED, CHORDS, tmp_path)
    assert result.clean, f"make chaos SEED={SEED} SCENARIO='{name}': {result}"
    assert result.chords == CHORDS
    assert result.hits > 0


@pytest.mark.slow
def test_the_checker_sees_what_celery_loses(tmp_path: Path) -> None:
    """A campaign that finds nothing anywhere would prove nothing."""
    with Arena(replace(KINDS["redis"], quiet=4.0)) as arena:
        scenario = SCENARIOS["dispatch.half-published:producer"]
        result = run(arena, scenario, SEED, CHORDS, tmp_path)
    assert result.lost == CHORDS, result


def test_every_fault_point_has_its_scenarios() -> None:
    """A point that is new is taken up by itself, unless it belongs to a process of a new kind."""
    for point in POINTS:
        assert len([name for name in SCENARIOS if name.startswith(f"{point}:")]) > 2, point


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_seed_repeats_a_plan(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]

    def made(seed: str) -> object:
        random = chance(seed, scenario)
        acts = plan.acts(scenario, random)
        return acts, plan.chords(scenario, CHORDS, 1.0, random, tmp_path)

    assert made("1") == made("1")
    assert made("1") != made("2")
