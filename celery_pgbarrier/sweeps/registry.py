"""The sweeps of each app, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from celery import Celery

from celery_pgbarrier.errors import ConfigurationError

if TYPE_CHECKING:
    from celery_pgbarrier.sweeps.base import Sweep

_sweeps: WeakKeyDictionary[Celery, dict[str, Sweep]] = WeakKeyDictionary()


def add(app: Celery, sweep: Sweep) -> None:
    """Make a sweep known.

    Raises:
        ConfigurationError: the app has another sweep of this name.
    """
    known = _sweeps.setdefault(app, {})
    if known.setdefault(sweep.name, sweep) is not sweep:
        raise ConfigurationError(
            f"there are two sweeps named {sweep.name!r}: only one of a name runs at a time, "
            "so give each its own"
        )


def sweeps(app: Celery) -> dict[str, Sweep]:
    """Return the sweeps of an app by name."""
    return dict(_sweeps.get(app, {}))
