"""A backlog that takes ten times ``pgbarrier_republish_after`` is not flooded with copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.acceptance.scene import Scene, sum_of
from tests.support.brokers import Broker

SIZE = 200
SECONDS = 0.05
BACK_OFF = 0.5
QUICK = {
    "pgbarrier_republish_after": BACK_OFF,
    "pgbarrier_reap_interval": 0.1,
    "pgbarrier_heartbeat": 0.1,
}


@pytest.mark.slow
def test_a_backlog_is_not_flooded(
    make_scene: Callable[..., Scene], database_url: str, each_broker: Broker
) -> None:
    """One probe in a back-off goes out, whatever the number of messages that wait."""
    scene = make_scene(database_url, each_broker, **QUICK)
    scene.worker(concurrency=2)
    begun = time.monotonic()
    scene.submit("backlog", SIZE, SECONDS * 2)
    scene.wait_settled({"backlog": sum_of(SIZE)}, 120)
    took = time.monotonic() - begun
    copies = scene.republished()
    print(
        f"{SIZE} members in {took:.1f} s, {took / BACK_OFF:.0f} x republish_after: "
        f"{copies} copies, {1 + copies / SIZE:.3f} messages a task"
    )
    assert took > 10 * BACK_OFF
    assert copies <= 2 * took / BACK_OFF
    assert copies <= 0.5 * SIZE
