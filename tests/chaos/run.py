"""Runs one scenario: calls the chords, does the deeds, waits for the end, counts."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from tests.chaos import leftovers, plan
from tests.chaos.arena import Arena
from tests.chaos.checker import EFFECTS, EVENTS, Evidence, Result, check
from tests.chaos.chords import Chord
from tests.chaos.scenarios import Scenario
from tests.chaos.stage import Stage, chance
from tests.chaos.victims import Victims

#: No scenario takes longer than this, seconds.
DEADLINE = 900.0

#: How often the ledger is asked whether all is over, seconds.
LOOK = 0.5

#: What may still be in a worker's hands when every chord has ended, seconds.
DRAIN = 12.0

ENDED = """
SELECT DISTINCT s.label FROM chaos_event s JOIN chaos_event e USING (task_id)
 WHERE s.event = 'start' AND e.event = 'stored' AND s.kind IN ('body', 'errback')
"""


def run(arena: Arena, scenario: Scenario, seed: str, count: int, folder: Path) -> Result:
    """Run a scenario with so many chords; its logs stay in ``folder``."""
    start = time.monotonic()
    random = chance(seed, scenario)
    acts = plan.acts(scenario, random)
    chords = plan.chords(scenario, count, acts[-1][0] if acts else 0.0, random, folder)
    result = Result(scenario.name, arena.kind.name, seed)
    with Stage(arena, scenario, folder) as stage:
        victims = Victims(stage, random)
        stage.call(chords)
        _Course(stage, victims, chords).follow(acts)
        evidence = Evidence(
            chords,
            stage.calls(),
            stage.query(EVENTS),
            stage.query(EFFECTS),
            victims.hits,
            arena.kind.ours,
        )
        check(result, evidence)
        rows = leftovers.left(stage)
        result.rows, result.details = len(rows), result.details + rows
    result.seconds = time.monotonic() - start
    return result


class _Course:
    """The course of a scenario, from its first call until nothing more is to be expected."""

    def __init__(self, stage: Stage, victims: Victims, chords: list[Chord]) -> None:
        self._stage, self._victims, self._chords = stage, victims, chords
        self._pause = threading.Event()
        self._start = self._moved = time.monotonic()
        self._seen: object = None
        self._looked = 0.0

    def follow(self, acts: list[tuple[float, str]]) -> None:
        """Do what is planned, and wait for the end."""
        self._wait(lambda: self._stage.report.exists() or self._producer_ended(), 60)
        begin = time.monotonic()
        for number, (moment, name) in enumerate(acts):
            if plan.gated(self._stage.scenario):
                self._wait(lambda: self._stage.ready and self._victims.idle, DEADLINE)
                moment = self._open_gate(number, moment) - begin
            self._wait(lambda m=moment: time.monotonic() >= begin + m, 60)
            self._victims.act(name)
        self._wait(self._settled, DEADLINE)
        self._wait(self._drained, DRAIN)

    def _open_gate(self, number: int, moment: float) -> float:
        """Let the chords be called that a deed is to meet; when it is to be done."""
        gate = plan.gate(self._stage.folder, number)
        gate.touch()
        labels = {chord.label for chord in self._chords if chord.gate == str(gate)}
        self._wait(lambda: not labels or labels & set(self._stage.calls()), 60)
        return time.monotonic() + 0.2 + moment % 0.5

    def _wait(self, reached: object, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._victims.tick()
            if reached():  # type: ignore[operator]
                return
            self._pause.wait(0.1)

    def _producer_ended(self) -> bool:
        producer = self._stage.producer
        return producer is not None and producer.poll() is not None

    def _settled(self) -> bool:
        """Whether every chord has ended, or nothing has happened for so long that none will."""
        stage = self._stage
        if not stage.arena.postgres.running or time.monotonic() < self._looked + LOOK:
            return False
        self._looked = time.monotonic()
        ended = {row.label for row in stage.query(ENDED)}
        moved = (len(self._victims.hits), stage.query("SELECT count(*) FROM chaos_event")[0][0])
        if moved != self._seen or not self._victims.idle or not stage.ready:
            self._seen, self._moved = moved, time.monotonic()
        if not self._victims.idle or not self._producer_ended():
            return False
        if all(self._is_over(chord, ended) for chord in self._chords):
            return not leftovers.open_rows(stage) or self._is_quiet()
        return self._is_quiet()

    def _is_over(self, chord: Chord, ended: set[str]) -> bool:
        call = self._stage.calls().get(chord.label)
        refused = call is not None and call != "returned"
        return chord.label in ended or chord.expected == "nothing" or refused

    def _is_quiet(self) -> bool:
        return time.monotonic() - self._moved > self._stage.arena.kind.quiet

    def _drained(self) -> bool:
        return self._stage.messages() == 0
