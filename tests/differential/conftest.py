"""Sides of a comparison, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from celery import Celery

from tests.differential.running import Side, sides
from tests.support.brokers import Broker
from tests.support.tables import close_pools


@pytest.fixture
def make_sides(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str, tmp_path: Path
) -> Iterator[Callable[..., AbstractContextManager[list[Side]]]]:
    """``make_sides(kind, ...)``: a context with a side of each kind."""
    yield lambda *kinds: sides(list(kinds), make_app, redis_broker, database_url, tmp_path / "n")
    close_pools()
