"""``make demo`` on a small part of the standard library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_demo() -> None:
    """Its exit status tells whether every claim held: counts, one outcome a member, one body."""
    command = [
        sys.executable,
        "-m",
        "examples.demo",
        "--files",
        "150",
        "--kills",
        "2",
        "--seed",
        "1",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs of the body, all told" in done.stdout
