"""What is done to the chords: every fault point with every victim, disturbances, mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_pgbarrier.faults import POINTS

#: How often a victim is hit in a scenario; 0: by every chord.
HITS = {"child": 0, "producer": 0, "worker": 4, "pause": 3, "broker": 3, "database": 3, "reaper": 4}

#: What a mixture draws from, with the weight of each.
MIXTURE = {
    "child": 6, "worker": 3, "parent": 2, "pause": 2, "flush": 2, "broker": 1, "database": 2,
    "duplicate": 4, "freeze": 1, "cut": 2,
}  # fmt: skip
MIXTURES = 8

#: How many scenarios hit each chord at a point of its own, and whom, with the weight of each.
ANYWHERE = 4
VICTIMS = {"child": 60, "producer": 12, "": 20, "worker": 2, "pause": 1, "broker": 2, "database": 3}
DISPATCH = tuple(name for name in POINTS if name.startswith("dispatch."))
RUN = tuple(name for name in POINTS if not name.startswith(("dispatch.", "reap.")))
#: Points at which a body is hit too.
BODY = ("claim.granted", "body.returned")


@dataclass(frozen=True)
class Scenario:
    """A scenario, the same for every backend.

    :param does: what happens, for the reader.
    :param point: the fault point of the chords' tickets, where there are any.
    :param victim: what is hit there.
    :param where: who carries them: ``member``, ``body``, ``dispatch``, ``any``.
    :param process: a point and a victim that processes carry: the worker's parent, a reaper.
    :param acts: what is done at random moments.
    :param ends: how a quarter of the chords ends: ``fail`` or ``die``.
    :param parts: other processes: ``reap`` (no reaper in workers), ``beat``, ``proxy``, ``skew``.
    :param ours: it concerns our backend only.
    """

    name: str
    does: str
    point: str = ""
    victim: str = ""
    where: str = ""
    process: tuple[str, str] | None = None
    acts: tuple[str, ...] = ()
    ends: str = ""
    parts: tuple[str, ...] = ()
    ours: bool = False
    mixed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def _dispatching() -> list[Scenario]:
    """The producer passes a point."""
    return [
        Scenario(
            f"{point}:{victim}", f"{POINTS[point]}: the {victim} dies", point, victim, "dispatch"
        )
        for point in DISPATCH
        for victim in ("producer", "broker", "database")
    ]


def _running() -> list[Scenario]:
    """The pool process of a chord's last member passes a point; or that of its body."""
    names = {"child": "pool process", "pause": "worker, stopped beyond its lease,"}
    found = [
        Scenario(
            f"{point}:{victim}",
            f"{POINTS[point]}: the {names.get(victim, victim)} dies",
            point,
            victim,
            "member",
        )
        for point in RUN
        for victim in ("child", "worker", "broker", "database", "pause")
    ]
    bodies = [
        Scenario(
            f"{point}:{victim} in the body",
            f"the same in the body: the {names.get(victim, victim)} dies",
            point,
            victim,
            "body",
        )
        for point in BODY
        for victim in ("child", "worker")
    ]
    return found + bodies


def _reaping() -> list[Scenario]:
    """Whoever reaps passes a point; before that something is orphaned for him."""
    found = []
    for victim in ("worker", "reaper", "beat", "broker", "database"):
        parts = {"reaper": ("reap",), "beat": ("beat",)}.get(victim, ())
        who = "child" if victim == "beat" else victim
        acts = ("beat",) * 3 if victim == "beat" else ()
        orphans = {
            "reap.advanced": ("dispatch.committed", "producer", "dispatch"),
            "reap.released": ("body.returned", "worker" if parts else "child", "member"),
            "release.committed": ("finish.committed", "child", "member"),
        }
        for point, orphaned in orphans.items():
            if point == "release.committed" and victim not in ("worker", "reaper"):
                continue
            found.append(
                Scenario(
                    f"{point}:{victim} in the reaper",
                    f"the reaper, {POINTS[point]}: the {victim} dies",
                    *orphaned,
                    process=(point, who),
                    acts=acts,
                    parts=parts,
                    ours=True,
                )
            )
    return found


def _disturbed() -> list[Scenario]:
    """Things happen at random moments."""
    return [
        Scenario("kill children", "pool processes are killed", acts=("child",) * 24),
        Scenario("kill workers", "workers are killed with their pools", acts=("worker",) * 5),
        Scenario("kill parents", "workers' main processes are killed", acts=("parent",) * 4),
        Scenario("pause workers", "workers stop beyond their lease", acts=("pause",) * 3),
        Scenario("flush broker", "the broker forgets everything", acts=("flush",) * 6),
        Scenario("restart broker", "the broker comes back empty", acts=("broker",) * 4),
        Scenario("restart database", "the result store is killed", acts=("database",) * 6),
        Scenario("duplicates", "messages are delivered twice", acts=("duplicate",) * 40),
        Scenario(
            "clock skew", "the workers' clocks are an hour off",
            acts=("child", "child", "worker") * 3,
            parts=("skew",),
        ),
        Scenario(
            "cut network", "a worker loses its connections to the store", acts=("cut",) * 5,
            parts=("proxy",),
        ),
        Scenario(
            "freeze network", "a worker hears nothing from the store beyond its lease",
            acts=("freeze",) * 3, parts=("proxy",),
        ),
        Scenario(
            "beat", "beat alone reaps; it, pool processes and workers are killed",
            acts=("beat",) * 4 + ("child",) * 6 + ("worker",) * 2, parts=("beat",), ours=True,
        ),
        Scenario("poison", "a member kills its process at each run", ends="die"),
        Scenario("failing header", "a member raises; pool processes are killed", ends="fail",
                 acts=("child",) * 8),
    ]  # fmt: skip


def _everywhere() -> list[Scenario]:
    """Every chord draws its own point and victim; worth many chords."""
    return [
        Scenario(f"any point {n}", "each chord is hit at a point of its own", where="any")
        for n in range(1, ANYWHERE + 1)
    ]


def _mixed() -> list[Scenario]:
    """Seeded mixtures of everything."""
    return [
        Scenario(f"mixture {n}", "a random mixture of all of this", parts=("proxy",), mixed=True)
        for n in range(1, MIXTURES + 1)
    ]


SCENARIOS = {
    scenario.name: scenario
    for scenario in [
        *_dispatching(),
        *_running(),
        *_reaping(),
        *_disturbed(),
        *_everywhere(),
        *_mixed(),
    ]
}
