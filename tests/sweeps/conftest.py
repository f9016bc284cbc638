"""A database with the user's tables, with and without those of pgbarrier beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from celery import Celery
from sqlalchemy.pool import NullPool

import celery_pgbarrier.results
from tests.support import databases
from tests.support.brokers import Broker
from tests.sweeps import models


@pytest.fixture
def engine(database_url: str) -> sa.Engine:
    """The user's engine, on the database of the pgbarrier tables."""
    made = sa.create_engine(database_url, poolclass=NullPool)
    models.Base.metadata.create_all(made)
    return made


@pytest.fixture
def bare_engine(empty_database_url: str) -> sa.Engine:
    """The user's engine, on a database without pgbarrier tables."""
    made = sa.create_engine(empty_database_url, poolclass=NullPool)
    models.Base.metadata.create_all(made)
    return made


@pytest.fixture
def app(
    make_app: Callable[..., Celery], redis_broker: Broker, database_url: str, engine: sa.Engine
) -> Celery:
    """An app whose result backend is in the database of the user's tables."""
    return make_app(redis_broker, databases.backend_url(database_url))


@pytest.fixture(autouse=True)
def no_connections_left() -> Iterator[None]:
    """Close the pools that the backends of a test have opened in this process."""
    yield
    pools = celery_pgbarrier.results._databases
    while pools:
        pools.popitem()[1].dispose()
