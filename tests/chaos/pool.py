"""Processes that run scenarios side by side, each with servers of its own."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path

from tests.chaos.arena import Arena
from tests.chaos.checker import Result
from tests.chaos.kinds import KINDS
from tests.chaos.run import run
from tests.chaos.scenarios import SCENARIOS, Scenario


def runs(
    backend: str, scenarios: Sequence[Scenario], seed: str, chords: int, jobs: int, folder: Path
) -> Iterator[Result]:
    """The results of scenarios on a backend, as they come, so many at a time."""
    jobs = min(jobs, len(scenarios))
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _open, (backend,))
    with pool:
        waiting = [pool.submit(_run, scenario.name, seed, chords, folder) for scenario in scenarios]
        for done in as_completed(waiting):
            yield done.result()


# -- in a process of the pool

_arenas: list[Arena] = []


def _open(backend: str) -> None:
    """Start this process's servers; they end with it."""
    arena = Arena(KINDS[backend])
    _arenas.append(arena.__enter__())
    Finalize(None, arena.__exit__, (None, None, None), exitpriority=10)


def _run(name: str, seed: str, chords: int, folder: Path) -> Result:
    """Run a scenario; trouble with it is a result too, and the servers are there for the next."""
    (arena,) = _arenas
    place = folder / name.replace(" ", "-").replace(":", "-")
    place.mkdir(parents=True)
    try:
        return run(arena, SCENARIOS[name], seed, chords, place)
    except Exception:
        for server in (arena.postgres, arena.broker, arena.results):
            server.start()
        return Result(name, arena.kind.name, seed, wrong=1, details=[traceback.format_exc()])
