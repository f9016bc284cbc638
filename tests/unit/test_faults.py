"""Fault points: harmless until armed, and armed only under names that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import celery_pgbarrier
from celery_pgbarrier import faults


def test_every_point_is_passed_somewhere_and_declared() -> None:
    root = Path(celery_pgbarrier.__file__).parent
    passed = {
        name
        for path in root.rglob("*.py")
        for name in re.findall(r'faults\.point\("([^"]+)"\)', path.read_text())
    }
    assert passed == set(faults.POINTS)


def test_nothing_is_armed() -> None:
    for name in faults.POINTS:
        faults.point(name)


def run(spec: str, *points: str) -> int:
    code = "import sys\nfrom celery_pgbarrier import faults\n" + "".join(
        f"faults.point({name!r})\n" for name in points
    )
    env = {**os.environ, faults.VARIABLE: spec}
    argv = [sys.executable, "-c", code]
    return subprocess.run(argv, env=env, stderr=subprocess.DEVNULL).returncode


def test_kill_and_exit(tmp_path: Path) -> None:
    once = tmp_path / "once"
    spec = f"claim.granted=kill@{once};body.returned=exit"
    assert run(spec, "finish.committed") == 0
    assert run(spec, "claim.granted") == -9
    assert run(spec, "claim.granted") == 0
    assert run(spec, "claim.granted", "body.returned") == 1


@pytest.mark.parametrize("spec", ["no.such=kill", "claim.granted=melt"])
def test_a_mistake_is_an_error(spec: str) -> None:
    with pytest.raises(ValueError, match="no such fault"):
        faults._parse(spec)
