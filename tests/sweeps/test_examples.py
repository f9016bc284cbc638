"""The examples run as they stand; that of the jobs kills a process for each kind of orphan."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support import databases
from tests.support.brokers import Broker
from tests.support.workers import ROOT, WorkerProcess

DOCUMENTS = [
    "{'batches': 1, 'rows': 200, 'failed': 0, 'left': 0}",
    "documents: {'deleted': 100, 'live': 100, 'stale': 100}",
    "files left: 300",
]
JOBS = [
    "revived: {'never published': 1, 'worker died': 1, 'retry lost': 1, 'next stage lost': 1, "
    '"next stage\'s worker died": 1}',
    *[f"job {n}: done, 2 attempts, completed 1 time(s)" for n in range(1, 6)],
]
OBJECTS = [
    "would expire: 4000",
    "run: 2000 rows in 2 batches, 2000 left\nrun: 2000 rows in 2 batches, 0 left\n",
    "objects: {'active': 100, 'completed': 500, 'stale_expired': 4000}",
]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("examples.sweeps.documents", DOCUMENTS),
        ("examples.sweeps.jobs", JOBS),
        ("examples.sweeps.objects", OBJECTS),
    ],
)
def test_example(
    module: str,
    expected: list[str],
    database_url: str,
    own_broker: Broker,
    start_worker: Callable[..., WorkerProcess],
) -> None:
    backend = databases.backend_url(database_url)
    servers = {"BROKER": own_broker.url, "BACKEND": backend, "PYTHONWARNINGS": "ignore"}
    if module != "examples.sweeps.objects":
        start_worker(own_broker, backend, app=module, env=servers)
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, **servers},
        capture_output=True,
        text=True,
        timeout=90,
    )
    for text in expected:
        assert text in done.stdout, done.stdout + done.stderr
