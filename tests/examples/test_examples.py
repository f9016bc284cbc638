"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from celery_pgbarrier.embedded import EmbeddedBroker
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("examples.first_chord", "its body returned 9900"),
        ("examples.effects", "processes that ran it: 2\npayments: 1"),
        ("examples.crash_recovery", "sum of squares: 285\na process died on the way: True"),
    ],
)
def test_example(
    module: str, expected: str, database_url: str, own_redis: EmbeddedBroker, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "BROKER": own_redis.url(),
        "BACKEND": f"pgbarrier+{database_url}",
        "PYTHONWARNINGS": "ignore",
    }
    log = tmp_path / "worker.log"
    command = [sys.executable, "-m", "celery", "-A", module, "worker", "-c", "2", "-l", "INFO"]
    with log.open("wb") as output:
        worker = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: b" ready." in log.read_bytes(), 30.0, log.read_text)
        done = subprocess.run(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
    finally:
        worker.terminate()
        worker.wait(timeout=30)
    assert expected in done.stdout, done.stdout + done.stderr + log.read_text()
