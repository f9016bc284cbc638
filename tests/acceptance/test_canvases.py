"""The canvases in every pool, in real workers, all in flight at once.

A few in the daily suite; with ``PGBARRIER_TEST_LONG=1`` all of them, claimed and plain, on Redis
and on RabbitMQ.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import ChordError

from tests.acceptance.scene import Scene
from tests.support.canvases import ERRORS, LINKS, VALUES
from tests.support.tasks import notes
from tests.support.waiting import wait_until
from tests.support.world import KINDS

LONG = bool(os.environ.get("PGBARRIER_TEST_LONG"))
POOLS = ["prefork", "threads", "gevent", "solo"]
DEADLINE = 300.0 if LONG else 60.0

#: One of each sort, for every day.
FEW = {
    "chain body",
    "chord body",
    "group body",
    "three chords deep",
    "chain that ends in a chord in a header",
    "generator header",
    "a member that is replaced by a chord",
    "a member that retries",
    "link of a body that is a chain",
    "the first step of a chain",
    "a member of an inner chord",
    "before a group that ends a chain",
}


def some(table: dict[str, Any]) -> dict[str, Any]:
    """The canvases of a table that are run this time."""
    return {name: entry for name, entry in table.items() if LONG or name in FEW}


class Run:
    """All canvases, sent at once, each with a file of its own for what its tasks tell."""

    def __init__(self, t: Any, folder: Path) -> None:
        self.t, self.folder = t, folder
        self.values = {
            name: canvas(self._maker(name)).apply_async()
            for name, (canvas, _) in some(VALUES).items()
        }
        self.links = {
            name: canvas(self._maker(name)).apply_async()
            for name, (canvas, _) in some(LINKS).items()
        }
        self.errors = {name: self._failing(name) for name in some(ERRORS)}

    def notes(self, name: str) -> list[str]:
        return notes(self._maker(name).path)

    def _maker(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(t=self.t, path=self.folder / name.replace(" ", "-"))

    def _failing(self, name: str) -> Any:
        maker = self._maker(name)
        canvas = ERRORS[name](maker)
        canvas.body.set(link_error=[self.t.noted_error.s(str(maker.path))])
        return canvas.apply_async()


@pytest.mark.slow
@pytest.mark.timeout(4 * DEADLINE)
@pytest.mark.parametrize(
    "broker", ["redis", *([pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)] if LONG else [])]
)
@pytest.mark.parametrize("kind", ["claimed", "plain"] if LONG else ["claimed"])
@pytest.mark.parametrize("pool", POOLS)
def test_canvases(
    request: pytest.FixtureRequest, make_scene: Callable[..., Scene], database_url: str,
    tmp_path: Path, pool: str, kind: str, broker: str,
) -> None:  # fmt: skip
    scene = make_scene(database_url, request.getfixturevalue(f"{broker}_broker"))
    scene.worker(pool=pool, concurrency=2)
    run = Run(KINDS[kind], tmp_path)
    for name, result in run.values.items():
        assert result.get(timeout=DEADLINE) == VALUES[name][1], name
    for name, result in run.errors.items():
        wait_until(result.ready, DEADLINE, name)
        assert isinstance(result.result, ChordError), name
        assert "as told" in str(result.result), name
    wait_until(lambda: not scene.open(), DEADLINE, scene.report)
    for name in run.links:
        assert run.notes(name) == LINKS[name][1], name
    for name, result in run.errors.items():
        assert run.notes(name) == [result.id], f"errbacks of {name}"
    twice = scene.query("SELECT name FROM pgbarrier_task WHERE attempt > 1 AND seq = 0")
    assert twice == [], "nothing ran a second time"
