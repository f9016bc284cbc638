"""What goes wrong, and when: planned by the number of members that are done."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import redis

from celery_pgbarrier.embedded import EmbeddedBroker
from examples.demo.crew import Crew

# Shares of the members. The last ones stay unharmed, and so does the body: a body that is killed in
# mid-run is run again, and one could not tell that from a body that was released twice.
FIRST, LAST = 0.05, 0.85

Deed = Callable[[], str | None]  # says what it hit; None: try again a moment later


class Chaos:
    """So many kills, of three kinds in turn, and one wipe of the broker among them."""

    def __init__(
        self, total: int, kills: int, crew: Crew, broker: EmbeddedBroker, rng: random.Random
    ) -> None:
        ways = itertools.cycle([crew.kill_worker, crew.kill_child, crew.kill_parent])
        deeds: list[Deed] = [next(ways) for _ in range(kills)]
        deeds.insert((kills + 1) // 2, lambda: wipe(broker))
        width = (LAST - FIRST) * total / len(deeds)
        self.total = total
        self.planned = len(deeds)
        self.pending = [
            (FIRST * total + width * (place + rng.random()), deed)
            for place, deed in enumerate(deeds)
        ]
        self.done: list[str] = []

    @property
    def kills(self) -> int:
        return sum(what.startswith("SIGKILL") for what in self.done)

    @property
    def wipes(self) -> int:
        return len(self.done) - self.kills

    def strike(self, members_done: int) -> str | None:
        """Do what is due; says what that was."""
        if not self.pending or members_done < self.pending[0][0] or members_done == self.total:
            return None
        struck = self.pending[0][1]()
        if struck is not None:
            self.pending.pop(0)
            self.done.append(struck)
        return struck


def wipe(broker: EmbeddedBroker) -> str | None:
    """FLUSHALL, once there is something to lose."""
    with redis.Redis.from_url(broker.url()) as client:
        waiting = client.llen("celery")
    if not waiting:
        return None
    broker.flush()
    return f"FLUSHALL: the broker forgot {waiting:,} messages"
