"""One scenario's database and processes; what dies is started again, as a process manager would."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import Popen
from types import TracebackType
from typing import Any

import redis
from sqlalchemy import Row, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from celery_pgbarrier import beat_schedule
from celery_pgbarrier.embedded import spawn
from tests.chaos import ledger, tickets
from tests.chaos.arena import Arena
from tests.chaos.chords import Chord
from tests.chaos.proxy import Proxy
from tests.chaos.scenarios import HITS, Scenario
from tests.chaos.tickets import OWN_DEEDS, Ticket
from tests.support.brokers import private_broker
from tests.support.workers import ROOT, BeatProcess, CeleryProcess, WorkerProcess, environment

APP = "tests.chaos.app"
WORKERS, CONCURRENCY = 2, 2
CLOCK = Path(__file__).parent / "clock"
HOUR = 3600


class ReapProcess(CeleryProcess):
    """``celery pgbarrier reap``: a reaper outside the workers."""

    command = ("pgbarrier", "reap")
    ready_text = "published"


class Stage:
    """The processes of one scenario; a context manager."""

    def __init__(self, arena: Arena, scenario: Scenario, folder: Path) -> None:
        self.arena, self.scenario, self.folder = arena, scenario, folder
        self.url = arena.new_database()
        self.engine = create_engine(self.url, pool_size=1, connect_args={"connect_timeout": 2})
        options = arena.kind.settings.get("broker_transport_options", {})
        self.broker = private_broker(arena.broker.url(), **options)
        self.tickets: list[Ticket] = []
        self.proxy: Proxy | None = None
        self.workers: list[WorkerProcess] = []
        self.beat: BeatProcess | None = None
        self.processes: list[CeleryProcess] = []
        self.producer: Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        self._stack = ExitStack()

    # -- processes

    def __enter__(self) -> Stage:
        if "proxy" in self.scenario.parts:
            self.proxy = self._stack.enter_context(Proxy(self.arena.store.port))
        for number in range(WORKERS):
            self.workers.append(WorkerProcess(concurrency=CONCURRENCY, **self._worker(number)))
        self.processes += self.workers
        if "reap" in self.scenario.parts:
            self.processes.append(ReapProcess(**self._common("reap")))
        if "beat" in self.scenario.parts:
            self.beat = BeatProcess(**self._common("beat"))
            self.processes.append(self.beat)
        for process in self.processes:
            self.start(process)
        for process in self.processes:
            process.wait_ready(300)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
        if self.producer is not None:
            self.producer.kill()
            self.producer.wait()
        self._stack.close()
        self.engine.dispose()

    def start(self, process: CeleryProcess) -> None:
        """Start a process, with the next ticket that processes are to carry."""
        process.env[tickets.VARIABLE] = json.dumps(
            [t.encode() for t in self._process_tickets(process)]
        )
        process.start()

    @property
    def ready(self) -> bool:
        """Whether every process works."""
        return all(p.running and p.ready_text in p.log() for p in self.processes)

    def restart_dead(self) -> None:
        """Start again what has died."""
        for process in self.processes:
            if not process.running:
                process.kill()
                self.start(process)

    def _process_tickets(self, process: CeleryProcess) -> list[Ticket]:
        if self.scenario.process is None or isinstance(process, BeatProcess):
            return []
        if "reap" in self.scenario.parts and not isinstance(process, ReapProcess):
            return []
        point, victim = self.scenario.process
        own = [ticket for ticket in self.tickets if ticket.point == point]
        if victim in OWN_DEEDS and not all(ticket.punched for ticket in own):
            return []
        number = next(self._numbers)
        if number > (HITS[victim] or 4):
            return []
        ticket = Ticket(point, victim, str(self.folder / f"process-{number}"))
        self.tickets.append(ticket)
        return [ticket]

    def _worker(self, number: int) -> dict[str, Any]:
        common = self._common(f"worker-{number}", proxied=number == 0)
        if "skew" in self.scenario.parts:
            path = os.pathsep.join([str(CLOCK), str(ROOT)])
            shift = str(HOUR if number else -HOUR)
            common["env"] = {**common["env"], "PYTHONPATH": path, "CHAOS_CLOCK_SHIFT": shift}
        return common

    def _common(self, name: str, proxied: bool = False) -> dict[str, Any]:
        return {
            "broker": self.broker,
            "backend": self.backend(proxied),
            "log": self.folder / f"{name}.log",
            "settings": self.settings(),
            "env": {ledger.DATABASE: self.url, "CHAOS_KIND": self.arena.kind.name},
            "app": APP,
        }

    def settings(self) -> dict[str, Any]:
        """What is set beyond the broker."""
        settings = {**self.arena.kind.settings, **self.scenario.settings}
        if self.arena.kind.ours and {"reap", "beat"} & set(self.scenario.parts):
            settings["pgbarrier_reap_in_worker"] = False
        if self.arena.kind.ours and "beat" in self.scenario.parts:
            settings["beat_schedule"] = beat_schedule(schedule=0.5)
        return settings

    def backend(self, proxied: bool = False) -> str:
        """The ``result_backend``, through the network that can be cut or not."""
        url, store = make_url(self.url), make_url(self.arena.results.url())
        if proxied and self.proxy:
            url, store = url.set(port=self.proxy.port), store.set(port=self.proxy.port)
        shown = [u.render_as_string(hide_password=False) for u in (url, store)]
        return self.arena.kind.url(*shown)

    def call(self, chords: Sequence[Chord]) -> None:
        """Call chords, from a process of its own."""
        jobs = self.folder / "chords.json"
        jobs.write_text(json.dumps([chord.encode() for chord in chords]))
        self.tickets += [chord.ticket for chord in chords if chord.ticket]
        env = environment(self.broker, self.backend(), self.settings())
        argv = [sys.executable, "-m", "tests.chaos.producer", str(jobs), str(self.report)]
        self.producer = spawn(
            argv,
            log=self.folder / "producer.log",
            cwd=ROOT,
            env={**os.environ, **env, ledger.DATABASE: self.url},
        )

    @property
    def report(self) -> Path:
        """Where the producer writes how its calls ended."""
        return self.folder / "calls"

    def calls(self) -> dict[str, str]:
        """How the calls ended, by label."""
        lines = self.report.read_text().splitlines() if self.report.exists() else []
        return dict(line.split(" ", 1) for line in lines)

    # -- questions

    def query(self, statement: str, **values: Any) -> list[Row[Any]]:
        """Run a statement; asked again while the database is away."""
        end = time.monotonic() + 30
        while True:
            try:
                with self.engine.begin() as connection:
                    result = connection.execute(text(statement), values)
                    return list(result.all()) if result.returns_rows else []
            except DBAPIError:
                if time.monotonic() > end:
                    raise
                threading.Event().wait(0.05)

    def messages(self) -> int:
        """How many messages wait in the broker.

        Those in workers' hands count where the broker is to give them back in the time of a
        scenario. Ours needs no such help: what a dead worker had fetched stays with the broker for
        its visibility timeout of an hour, and is then dropped.
        """
        with suppress(redis.RedisError), redis.Redis.from_url(self.broker.url) as client:
            count = int(client.llen(self.broker.queue))
            return count if self.arena.kind.ours else count + int(client.hlen("unacked"))
        return 0


def chance(seed: str, scenario: Scenario) -> random.Random:
    """Random numbers, the same for each run of a scenario with a seed, on every backend."""
    return random.Random(f"{seed} {scenario.name}")
