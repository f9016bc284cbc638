"""A side of the comparison: a backend that runs canvases, and what can be seen of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery, states
from celery.result import GroupResult, ResultBase

from tests.differential import tasks
from tests.differential.canvases import Builder, Node
from tests.support import brokers
from tests.support.brokers import Broker
from tests.support.world import World, open_world

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

#: So many canvases are kept in the tables.
WIPE = 50
OPEN = """
SELECT 'task', id, name, state, barrier_id FROM pgbarrier_task WHERE state <> 'done'
UNION ALL
SELECT 'barrier', id, NULL, state, NULL FROM pgbarrier_barrier WHERE state IN ('waiting', 'ready')
"""


@dataclass(frozen=True)
class Seen:
    """What a canvas came to: its outcome, those of its parents, and what its tasks told."""

    outcome: Any
    parents: tuple[Any, ...]
    told: Counter[str]

    def difference(self, other: Seen) -> str:
        """Where another one differs, for the message of a failure."""
        lines = []
        for name in ("outcome", "parents"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                lines += [f"{name}:", f"  {mine}", f"  {its}"]
        lines += [f"only the first told {line!r}" for line in self.told - other.told]
        lines += [f"only the second told {line!r}" for line in other.told - self.told]
        return "\n".join(lines)


class Side:
    """One backend with one long-lived worker; canvases are run to their end, one by one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.tasks = tasks.claimed if world.kind == "claimed" else tasks.plain
        self._runs = 0

    def run(self, canvas: Node) -> Seen:
        """Run a canvas until no message is left."""
        self.world.app.set_current()
        if self._runs % WIPE == 0 or not self.world.nothing_open():
            self._wipe()
        self._runs += 1
        tasks.told.clear()
        builder = Builder(self.tasks, self._runs, gather=self.world.kind != "claimed")
        try:
            result = builder.build(canvas).apply_async()
        except Exception as error:
            self.world.worker.drain()
            return Seen(f"raised {_described(error)}", (), tasks.told[self._runs])
        self.world.worker.drain()
        parents = tuple(_outcome(parent) for parent in _parents(result))
        return Seen(_outcome(result), parents, tasks.told[self._runs])

    def left_open(self) -> list[str]:
        """What has not come to its end, though no message is left (ours alone)."""
        if self.world.tables is None or self.world.nothing_open():
            return []
        rows = self.world.tables.ask(OPEN)
        return [" ".join(map(str, row)) for row in rows]

    def _wipe(self) -> None:
        if self.world.tables is not None:
            tables = ("task", "slot", "barrier", "dispatch")
            named = ", ".join(f"pgbarrier_{table}" for table in tables)
            self.world.tables.ask(f"TRUNCATE {named}")


def _parents(result: ResultBase) -> Iterator[ResultBase]:
    while (result := result.parent) is not None:
        yield result


def _outcome(result: ResultBase) -> Any:
    if isinstance(result, GroupResult):
        return [_outcome(child) for child in result.results]
    meta = result._get_task_meta()
    if meta["status"] in states.PROPAGATE_STATES:
        return f"{meta['status']} {_described(meta['result'])}"
    return (meta["status"], meta["result"])


def _described(error: Any) -> str:
    return _ID.sub("<id>", f"{type(error).__name__}: {error}")


@contextmanager
def sides(
    kinds: list[str],
    make_app: Callable[..., Celery],
    redis: Broker,
    database_url: str,
    path: Path,
) -> Iterator[list[Side]]:
    """A side of each kind; their messages stay in this process, for speed."""
    # Celery's Redis backend joins nested headers by waiting for what may never come.
    patience = {"result_chord_join_timeout": 0.1}
    with ExitStack() as stack:
        made = []
        for kind in kinds:
            broker = Broker("memory://", brokers.new_queue())
            world = open_world(kind, make_app, broker, database_url, path, redis, **patience)
            made.append(Side(stack.enter_context(world)))
        yield made
