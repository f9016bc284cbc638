"""A filter that no index serves earns a warning with the CREATE INDEX that would."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from celery_pgbarrier.sweeps import Purge
from tests.sweeps.models import Document


@pytest.fixture
def large(engine: sa.Engine) -> sa.Engine:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO documents (deleted_at, state) SELECT now() - n * interval '1 minute', "
            "CASE WHEN n %% 100 = 0 THEN 'old' ELSE 'live' END FROM generate_series(1, 12000) AS n"
        )
        connection.exec_driver_sql("ANALYZE documents")
    return engine


def warning(engine: sa.Engine, caplog: pytest.LogCaptureFixture, where: Any) -> str | None:
    caplog.clear()
    Purge("documents", Document, where=where).dry_run(engine)
    found = re.search(r"CREATE INDEX .*", caplog.text)
    return found.group(0) if found else None


def old(now: Any) -> Any:
    return (Document.deleted_at < now - timedelta(days=8)) & (Document.status == "old")


def test_the_index_that_it_names_silences_it(
    large: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    assert warning(large, caplog, Document.id < 100) is None
    statement = warning(large, caplog, old)
    assert statement == "CREATE INDEX CONCURRENTLY ON documents (state, deleted_at)"
    with large.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(statement)
    assert warning(large, caplog, old) is None


def test_a_partial_index_serves(large: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    with large.begin() as connection:
        connection.exec_driver_sql("CREATE INDEX ON documents (id) WHERE state = 'old'")
    assert warning(large, caplog, Document.status == "old") is None
    assert warning(large, caplog, Document.path.is_(None)) is not None


def test_a_small_table_and_a_second_run_are_silent(
    engine: sa.Engine, large: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = Purge("documents", Document, where=old)
    sweep.run(large, max_batches=1)
    assert "CREATE INDEX" in caplog.text
    caplog.clear()
    sweep.run(large)
    assert "CREATE INDEX" not in caplog.text
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM documents WHERE id > 100")
        connection.exec_driver_sql("ANALYZE documents")
    assert warning(large, caplog, old) is None
