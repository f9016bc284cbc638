"""Backend URLs: what is taken, what is refused, and that no password is shown."""

from __future__ import annotations

import sys
import traceback

import pytest
from celery import Celery

from celery_pgbarrier.errors import ConfigurationError, DatabaseUnavailable
from celery_pgbarrier.store import sql
from celery_pgbarrier.store.database import Database
from celery_pgbarrier.store.url import parse_url


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("pgbarrier://u:p@h:1/d", "psycopg2"),
        ("postgresql://u:p@h:1/d", "psycopg2"),
        ("postgresql+psycopg2://u:p@h:1/d", "psycopg2"),
        ("postgresql+psycopg://u:p@h:1/d", "psycopg"),
        ("postgresql://u:p%40%2F@h:1/d", "psycopg2"),
    ],
)
def test_drivers(url: str, driver: str) -> None:
    parsed = parse_url(url)
    assert parsed.get_driver_name() == driver
    assert (parsed.username, parsed.host, parsed.port, parsed.database) == ("u", "h", 1, "d")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://u:s3cret@h/d", "PostgreSQL, not mysql"),
        ("sqlite:///file", "PostgreSQL, not sqlite"),
        ("redis://:s3cret@h/0", "PostgreSQL, not redis"),
        ("postgresql+asyncpg://u:s3cret@h/d", "psycopg2 and psycopg, not asyncpg"),
        ("postgresql+pg8000://u:s3cret@h/d", "psycopg2 and psycopg, not pg8000"),
        ("s3cret", "is not a URL"),
        ("", "is not a URL"),
        ("postgresql://u:pw@h:port/d", "is not a URL"),
    ],
)
def test_a_wrong_url_is_refused_with_the_remedy(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as error:
        parse_url(url)
    assert "pgbarrier" in str(error.value)
    assert "s3cret" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    "url", ["pgbarrier+mysql://u:s3cret@h/d", "pgbarrier+postgresql+asyncpg://u:s3cret@h/d"]
)
def test_an_app_refuses_it_too(url: str) -> None:
    app = Celery(broker="memory://", backend=url, set_as_current=False)
    with pytest.raises(ConfigurationError) as error:
        _ = app.backend
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("driver", "package"), [("psycopg2", "psycopg2-binary"), ("psycopg", "[psycopg]")]
)
def test_a_missing_driver_names_the_package(
    monkeypatch: pytest.MonkeyPatch, driver: str, package: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == driver]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, driver, None)
    database = Database(parse_url(f"postgresql+{driver}://u:s3cret@127.0.0.1:1/d"))
    with pytest.raises(ConfigurationError, match="not installed: pip install") as error:
        database.statement(sql.RESULTS, {"ids": []})
    assert package in str(error.value)


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_server_that_is_away_is_named_without_its_password(driver: str) -> None:
    database = Database(parse_url(f"postgresql+{driver}://u:s3cret@127.0.0.1:1/d"))
    with pytest.raises(DatabaseUnavailable, match=r"u:\*\*\*@127.0.0.1:1/d is away") as error:
        database.statement(sql.RESULTS, {"ids": []})
    assert "s3cret" not in "".join(traceback.format_exception(error.value))


def test_as_uri_hides_the_password_unless_asked() -> None:
    app = Celery(broker="memory://", backend="pgbarrier://u:s3cret@h:1/d", set_as_current=False)
    assert app.backend.as_uri() == "pgbarrier+postgresql+psycopg2://u:***@h:1/d"
    assert "s3cret" in app.backend.as_uri(include_password=True)
    again = Celery(
        broker="memory://", backend=app.backend.as_uri(include_password=True), set_as_current=False
    )
    assert again.backend.database.url == app.backend.database.url
    assert "s3cret" not in repr(app.backend.database)


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_an_unknown_option_in_the_query_is_named(driver: str) -> None:
    url = f"pgbarrier+postgresql+{driver}://u:s3cret@127.0.0.1:1/db?bogus=1"
    app = Celery(broker="memory://", backend=url, set_as_current=False)
    with pytest.raises(ConfigurationError, match="no connection option bogus") as error:
        app.backend.get_state("x")
    assert "s3cret" not in str(error.value)


def test_a_password_in_the_query_is_not_shown() -> None:
    database = Database(parse_url("pgbarrier://u@127.0.0.1:1/db?password=s3cret"))
    assert "s3cret" not in repr(database)
