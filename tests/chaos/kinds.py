"""The backends under the campaign: ours, and two of Celery's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.support.app import FAST_RECOVERY

#: What Celery's own backends need, so that its losses are losses and not delays of an hour: late
#: acknowledgement, and a broker that gives the messages of a dead worker back after ten seconds.
PEER_SETTINGS = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "broker_transport_options": {
        "visibility_timeout": 10,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    },
}


@dataclass(frozen=True)
class Kind:
    """A backend: its name in the table, and the settings of its applications.

    :param quiet: how long nothing may happen before what is missing counts as lost, seconds.
    """

    name: str
    title: str
    settings: dict[str, Any]
    quiet: float

    @property
    def ours(self) -> bool:
        return self.name == "ours"

    def url(self, postgres: str, store: str) -> str:
        """The ``result_backend``, given the URLs of the database and of the Redis store."""
        urls = {"ours": f"pgbarrier+{postgres}", "database": f"db+{postgres}", "redis": store}
        return urls[self.name]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("ours", "pgbarrier", {**FAST_RECOVERY, "pgbarrier_max_crashes": 5}, 60.0),
        Kind("redis", "Celery, Redis backend", PEER_SETTINGS, 16.0),
        Kind("database", "Celery, database backend", PEER_SETTINGS, 16.0),
    )
}

#: lease + 2 heartbeats + reap interval, seconds: G7.
BOUND = (
    FAST_RECOVERY["pgbarrier_lease"]
    + 2 * FAST_RECOVERY["pgbarrier_heartbeat"]
    + FAST_RECOVERY["pgbarrier_reap_interval"]
)
