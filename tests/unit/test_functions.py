"""The functions of the database are those that this release calls."""

from __future__ import annotations

import hashlib

import pytest

from celery_pgbarrier.store.migrations.versions import v0009_flushed_claims as newest
from celery_pgbarrier.store.sql.functions import FUNCTIONS, Function


def digest() -> str:
    text = "".join(function.definition for function in FUNCTIONS.values())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_changed_function_has_a_migration() -> None:
    """Databases that are at the newest version would keep the old one."""
    assert digest() == newest.DIGEST


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_call_passes_every_parameter_once(function: Function) -> None:
    assert function.parameters
    for name in function.parameters:
        assert function.call.count(f":{name} ") == 1
        assert f"p_{name} " in function.definition
    body = function.definition.split("$pgbarrier$")[1]
    assert ":" not in body.replace("::", "")


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_plan_that_is_kept_goes_by_indexes(function: Function) -> None:
    """A sequential scan that is right for ten rows would be kept while the table grows."""
    head = function.definition.split("$pgbarrier$")[0]
    for setting in ("enable_seqscan", "enable_hashjoin", "enable_mergejoin"):
        assert f"SET {setting} = off" in head
