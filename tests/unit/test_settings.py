"""Settings: a mistake is an error that names the key and what would be right."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.settings import OPTIONS, Settings, load

URL = "pgbarrier://nobody:secret@127.0.0.1:1/nowhere"


def test_defaults() -> None:
    settings = load({})
    assert (settings.lease, settings.heartbeat, settings.max_crashes) == (60.0, 10.0, 5)
    assert (settings.reap_interval, settings.reap_in_worker) == (15.0, True)
    assert (settings.republish_after, settings.batch_size) == (300.0, 1000)
    assert (settings.schema, settings.auto_migrate) == (None, True)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("pgbarrier_leese", "pgbarrier_lease"),
        ("pgbarrier_heart_beat", "pgbarrier_heartbeat"),
        ("pgbarrier_max_crash", "pgbarrier_max_crashes"),
        ("pgbarrier_republish", "pgbarrier_republish_after"),
        ("PGBARRIER_BATCHSIZE", "pgbarrier_batch_size"),
        ("pgbarrier_automigrate", "pgbarrier_auto_migrate"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{key}.*{nearest}\b"):
        load({key: 1})


def test_an_unknown_key_is_found_in_the_conf_of_an_app() -> None:
    app = Celery(broker="memory://", backend=URL, set_as_current=False)
    app.conf.update(pgbarrier_leese=1)
    with pytest.raises(ConfigurationError, match="pgbarrier_lease"):
        _ = app.backend


def test_other_keys_are_not_ours() -> None:
    assert isinstance(load({"task_default_queue": "q", "my_barrier": 1}), Settings)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("lease", 0, "at least 0.5"),
        ("lease", -1, "at least"),
        ("lease", "60", "a number"),
        ("lease", True, "a number"),
        ("lease", None, "a number"),
        ("heartbeat", 0, "at least"),
        ("max_crashes", 0, "at least 1"),
        ("max_crashes", 1.5, "whole number"),
        ("max_crashes", 10**6, "at most"),
        ("batch_size", 0, "at least 1"),
        ("batch_size", 10**7, "at most"),
        ("reap_in_worker", 1, "True or False"),
        ("auto_migrate", "yes", "True or False"),
        ("schema", 5, "a string"),
        ("republish_after", 0, "at least"),
        ("dedup_expires", 0, "at least"),
        ("lease", float("nan"), "number"),
        ("lease", float("inf"), "at most"),
    ],
)
def test_a_bad_value_names_the_key_and_the_rule(name: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"pgbarrier_{name} .*{rule}"):
        load({f"pgbarrier_{name}": value})


def test_a_heartbeat_above_a_third_of_the_lease_is_refused() -> None:
    assert load({"pgbarrier_lease": 30.0, "pgbarrier_heartbeat": 10.0}).heartbeat == 10
    with pytest.raises(ConfigurationError, match=r"pgbarrier_heartbeat.*third.*pgbarrier_lease"):
        load({"pgbarrier_lease": 30.0, "pgbarrier_heartbeat": 10.1})
    with pytest.raises(ConfigurationError, match="third"):
        load({"pgbarrier_lease": 20.0})


def test_dedup_below_result_expires_is_not_taken() -> None:
    """Rows are kept for as long as the longer of the two says."""
    app = Celery(broker="memory://", backend=URL, set_as_current=False)
    app.conf.update(result_expires=3600, pgbarrier_dedup_expires=60)
    assert app.backend.keep == 3600
    app = Celery(broker="memory://", backend=URL, set_as_current=False)
    app.conf.update(result_expires=60, pgbarrier_dedup_expires=3600)
    assert app.backend.keep == 3600


def test_every_option_has_help_and_a_field() -> None:
    assert {option.name for option in OPTIONS} == set(Settings.__dataclass_fields__)
    for option in OPTIONS:
        assert option.help
        assert option.check(option.default) == option.default


def test_task_protocol_1_is_refused() -> None:
    app = Celery(broker="memory://", backend=URL, set_as_current=False)
    app.conf.update(task_protocol=1)
    with pytest.raises(Exception, match="task_protocol = 2"):
        _ = app.backend


@pytest.mark.parametrize("name", ["", 'a"b', "a\0b", "x" * 64])
def test_a_schema_that_cannot_be_one(name: str) -> None:
    with pytest.raises(ConfigurationError, match="pgbarrier_schema"):
        load({"pgbarrier_schema": name})


def test_options_of_a_sweep_that_are_none() -> None:
    with pytest.raises(ConfigurationError, match=r"pgbarrier_sweeps\['documents'\].*dict"):
        load({"pgbarrier_sweeps": {"documents": 3}})
