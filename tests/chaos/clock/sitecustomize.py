"""Shifts the wall clock of the process whose ``PYTHONPATH`` leads here (clock skew).

``CHAOS_CLOCK_SHIFT`` gives the seconds. Monotonic clocks go on as they are.
"""

import datetime
import os
import time

SHIFT = float(os.environ.get("CHAOS_CLOCK_SHIFT", "0"))
_time, _datetime = time.time, datetime.datetime


class _Real(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _datetime)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _datetime)


class _Shifted(_datetime, metaclass=_Real):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return _datetime.now(tz) + datetime.timedelta(seconds=SHIFT)

    @classmethod
    def utcnow(cls) -> datetime.datetime:
        naive = _datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        return naive + datetime.timedelta(seconds=SHIFT)


if SHIFT:
    time.time = lambda: _time() + SHIFT
    datetime.datetime = _Shifted  # type: ignore[misc]
