"""From a scenario and a seed: which chords are called, who carries a ticket, what is done when."""

from __future__ import annotations

import random
from pathlib import Path

from tests.chaos.chords import Chord
from tests.chaos.scenarios import BODY, DISPATCH, HITS, MIXTURE, RUN, VICTIMS, Scenario
from tests.chaos.tickets import Ticket

#: How long a member takes where it is to be disturbed at a random moment, seconds.
SECONDS = 0.4
#: Seconds to the next deed.
SPACING = {
    "child": 0.3, "producer": 0.0, "worker": 2.0, "parent": 2.0, "pause": 2.0, "broker": 1.5,
    "flush": 1.0, "database": 2.0, "reaper": 0.0, "beat": 1.0, "cut": 2.0, "freeze": 7.0,
    "duplicate": 0.05,
}  # fmt: skip
ACTS = 16
#: How much faster a mixture goes: its deeds meet.
HASTE = 0.5


#: Deeds that are done when another worker is there to take over, mixtures apart.
ALONE = {"worker", "parent", "pause", "freeze"}


def gated(scenario: Scenario) -> bool:
    """Whether chords wait for the deeds that are to meet them, and these for all workers."""
    return bool(ALONE & set(scenario.acts))


def gate(folder: Path, number: int) -> Path:
    """What the chords wait for that a deed is to meet."""
    return folder / f"gate-{number}"


def chords(
    scenario: Scenario, count: int, seconds: float, chance: random.Random, folder: Path
) -> list[Chord]:
    """The chords of a scenario, in the order of their calls, which take so many seconds."""
    carriers = _carriers(scenario, count, chance)
    ending = range(0, count, 4) if scenario.ends else ()
    mixed_ends = set(chance.sample(range(count), count // 8)) if scenario.mixed else set()
    deeds = bool(scenario.acts or scenario.mixed)
    found = []
    for number in range(count):
        label = f"chord-{number}"
        ticket, waits = None, ""
        where = ""
        if number in carriers:
            point, victim, where = carriers[number]
            ticket = Ticket(point, victim, str(folder / label))
            waits = ticket.gate
        elif gated(scenario):
            waits = str(gate(folder, number * len(scenario.acts) // count))
        found.append(
            Chord(
                label,
                chance.randint(2, 6),
                seconds=SECONDS if deeds else 0.0,
                ticket=ticket,
                where=where,
                ends=scenario.ends if number in ending else "fail" if number in mixed_ends else "",
                pause=seconds / count if deeds or not ticket else SPACING[ticket.victim],
                gate=waits,
            )
        )
    return found


def _carriers(
    scenario: Scenario, count: int, chance: random.Random
) -> dict[int, tuple[str, str, str]]:
    """Point, victim and carrier of each chord's fault."""
    if scenario.where == "any":
        drawn = ((number, _anywhere(chance)) for number in range(count))
        return {number: fault for number, fault in drawn if fault[1]}
    if not scenario.point:
        return {}
    hits = HITS[scenario.victim]
    numbers = range(count)
    chosen = chance.sample(numbers, max(1, min(hits, count // 8))) if hits else numbers
    return dict.fromkeys(chosen, (scenario.point, scenario.victim, scenario.where))


def _anywhere(chance: random.Random) -> tuple[str, str, str]:
    victim = chance.choices(list(VICTIMS), list(VICTIMS.values()))[0]
    if victim == "producer" or (victim in ("broker", "database") and chance.random() < 0.5):
        return chance.choice(DISPATCH), victim, "dispatch"
    point = chance.choice(RUN)
    return point, victim, "body" if point in BODY and chance.random() < 0.3 else "member"


def acts(scenario: Scenario, chance: random.Random) -> list[tuple[float, str]]:
    """What is done at random moments of the calls, with the seconds since the first of them."""
    names = list(scenario.acts)
    if scenario.mixed:
        names = chance.choices(list(MIXTURE), list(MIXTURE.values()), k=ACTS)
    chance.shuffle(names)
    moment, found = 0.2, []
    for name in names:
        found.append((moment, name))
        moment += SPACING[name] * chance.uniform(0.7, 1.3) * (HASTE if scenario.mixed else 1.0)
    return found
