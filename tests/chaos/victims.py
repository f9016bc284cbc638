"""Who is hit, and how: what the campaign does to processes, servers and messages."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import signal
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import redis

from tests.chaos.kinds import BOUND
from tests.chaos.stage import Stage
from tests.chaos.tickets import Ticket

#: A pause or a silent network lasts for longer than it takes to declare a worker dead.
LONG = BOUND + 2.0

#: How long a chord that was called may take to come to its ticket's point, seconds.
PATIENCE = 15.0


@dataclass(frozen=True)
class Hit:
    """What was done, when (seconds of the machine's clock), and to which processes or groups."""

    name: str
    at: float
    pids: frozenset[int] = frozenset()
    label: str = ""


@dataclass
class Victims:
    """Does the deeds and remembers them; ``tick()`` is to be called again and again."""

    stage: Stage
    chance: random.Random
    hits: list[Hit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._served: set[str] = set()
        self._copied: set[str] = set()
        self._opened: dict[str, float] = {}

    # -- the loop

    def tick(self) -> None:
        """Do what is due, serve punched tickets, start again what died."""
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()
        for ticket in self.stage.tickets:
            if ticket.path not in self._served and ticket.punched:
                self._served.add(ticket.path)
                self._serve(ticket)
        self.stage.restart_dead()
        if self.idle and self.stage.ready:
            self._open_gate()

    def _open_gate(self) -> None:
        """Let the next chord be called whose ticket takes a worker away."""
        now = time.monotonic()
        for ticket in self.stage.tickets:
            if not ticket.gate or ticket.punched:
                continue
            opened = self._opened.setdefault(ticket.path, now)
            Path(ticket.gate).touch()
            if now - opened < PATIENCE:
                return

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._later

    def later(self, seconds: float, work: Callable[[], object]) -> None:
        """Do something in so many seconds."""
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), work))

    def _serve(self, ticket: Ticket) -> None:
        pid, group = ticket.process
        label = os.path.basename(ticket.path)
        pids = {pid, group} if ticket.victim in ("worker", "pause") else {pid}
        if ticket.victim in ("broker", "database"):
            pids = set()
        self.hits.append(Hit(ticket.victim, ticket.at, frozenset(pids), label))
        if ticket.victim == "pause":
            self.later(LONG, lambda: self._resume(group))
        elif ticket.victim == "broker":
            self._kill_broker()
        elif ticket.victim == "database":
            self._kill_database()
        ticket.done()

    # -- deeds

    def act(self, name: str) -> None:
        """Do a deed by its name."""
        getattr(self, f"_{name}")()

    def _hit(self, name: str, *pids: int) -> None:
        self.hits.append(Hit(name, time.time(), frozenset(pids)))

    def _child(self) -> None:
        pids = [pid for worker in self.stage.workers if worker.running for pid in worker.children()]
        if pids:
            pid = self.chance.choice(sorted(pids))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._hit("child", pid)

    def _worker(self) -> None:
        worker = self.chance.choice(self.stage.workers)
        if worker.running:
            self._hit("worker", worker.pid)
            worker.kill()

    def _parent(self) -> None:
        worker = self.chance.choice(self.stage.workers)
        if worker.running:
            self._hit("parent", worker.pid)
            worker.kill_parent()

    def _beat(self) -> None:
        if self.stage.beat is not None and self.stage.beat.running:
            self._hit("beat")
            self.stage.beat.kill()

    def _pause(self) -> None:
        worker = self.chance.choice(self.stage.workers)
        if worker.running:
            self._hit("pause", worker.pid)
            group = worker.pid
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGSTOP)
            self.later(LONG, lambda: self._resume(group))

    def _resume(self, group: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGCONT)

    def _flush(self) -> None:
        self._hit("flush")
        self.stage.arena.broker.flush()

    def _broker(self) -> None:
        self._hit("broker")
        self._kill_broker()

    def _kill_broker(self) -> None:
        self.stage.arena.broker.kill()
        self.later(self.chance.uniform(0.1, 1.0), self.stage.arena.broker.start)

    def _database(self) -> None:
        self._hit("database")
        self._kill_database()

    def _kill_database(self) -> None:
        self.stage.arena.store.kill()
        self.later(self.chance.uniform(0.1, 2.0), self.stage.arena.store.start)

    def _cut(self) -> None:
        if self.stage.proxy is not None:
            self._hit("cut")
            self.stage.proxy.cut()
            self.later(self.chance.uniform(0.1, 2.0), self.stage.proxy.heal)

    def _freeze(self) -> None:
        if self.stage.proxy is not None:
            self._hit("freeze")
            self.stage.proxy.freeze()
            self.later(LONG, self.stage.proxy.heal)

    def _duplicate(self) -> None:
        """Deliver the messages that wait, and those in workers' hands, once more each."""
        self._hit("duplicate")
        broker = self.stage.broker
        with suppress(redis.RedisError), redis.Redis.from_url(broker.url) as client:
            waiting = [json.loads(value) for value in client.lrange(broker.queue, 0, -1)]
            in_hand = [json.loads(value)[0] for value in client.hvals("unacked")]
            for message in [*waiting, *in_hand]:
                task_id = message["headers"]["id"]
                if task_id not in self._copied:  # copies of copies would only fill the queue
                    self._copied.add(task_id)
                    message["properties"]["delivery_tag"] = str(uuid.uuid4())
                    client.lpush(broker.queue, json.dumps(message))
