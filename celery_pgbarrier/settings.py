"""The ``pgbarrier_*`` settings: each is declared once, with unit, default, bounds and help."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery_pgbarrier.errors import ConfigurationError

PREFIX = "pgbarrier_"


@dataclass(frozen=True)
class Option:
    """One setting: its name without prefix, type, default, bounds, unit and a line of help."""

    name: str
    kind: type
    default: Any
    help: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    optional: bool = False

    @property
    def key(self) -> str:
        """The name as it stands in ``app.conf``."""
        return PREFIX + self.name

    def check(self, value: Any) -> Any:
        """Return *value* in the option's type.

        Raises:
            ConfigurationError: the value has another type or is out of bounds.
        """
        if value is None and self.optional:
            return None
        number = self.kind in (int, float)
        wrong = isinstance(value, bool) or not isinstance(value, (int, float))
        if (number and wrong) or (not number and not isinstance(value, self.kind)):
            raise self._error(value, f"must be {self._kind_text()}")
        if number and math.isnan(value):
            raise self._error(value, "must be a number")
        if self.kind is int and (math.isinf(value) or value != int(value)):
            raise self._error(value, "must be a whole number")
        value = self.kind(value)
        if self.minimum is not None and value < self.minimum:
            raise self._error(value, f"must be at least {self.minimum}")
        if self.maximum is not None and value > self.maximum:
            raise self._error(value, f"must be at most {self.maximum}")
        return value

    def _kind_text(self) -> str:
        names = {
            int: "a whole number",
            float: "a number",
            bool: "True or False",
            str: "a string",
            dict: "a dict",
        }
        return names[self.kind] + (f" ({self.unit})" if self.unit else "")

    def _error(self, value: Any, rule: str) -> ConfigurationError:
        return ConfigurationError(f"{self.key} {rule}, got {value!r}: {self.help}")


OPTIONS = (
    Option("lease", float, 60.0, "how long a worker may be silent before its claims pass on",
           "s", 0.5, 86400),
    Option("heartbeat", float, 10.0, "how often a worker renews its lease", "s", 0.05, 28800),
    Option("max_crashes", int, 5, "how often a task may kill its process before it fails",
           "", 1, 1000),
    Option("reap_interval", float, 15.0, "how often orphans are looked for", "s", 0.05, 86400),
    Option("reap_in_worker", bool, True, "whether every worker also runs the reaper in a thread"),
    Option("republish_after", float, 300.0,
           "when an unclaimed message is published again; doubled at each republication",
           "s", 0.1, 604800),
    Option("empty_after", float, 30.0,
           "when an unclaimed message whose queue is empty or gone is published again, at most "
           "republish_after; doubled at each republication",
           "s", 0.1, 604800),
    Option("publish_grace", float, 10.0,
           "how long the process that recorded a message has to publish it", "s", 0.1, 3600),
    Option("dedup_expires", float, None,
           "how long a finished row still recognises a late copy; at least result_expires",
           "s", 1, None, optional=True),
    Option("batch_size", int, 1000, "rows per statement of periodic and bulk work", "", 1, 100000),
    Option("claim_ahead", int, 32,
           "up to how many waiting messages of short tasks a busy prefork worker claims in one "
           "statement; 0: each process claims for itself",
           "messages", 0, 10000),
    Option("inline_results", int, 32768,
           "up to how many bytes of encoded results a chord's body gets in its message",
           "bytes", 0, None),
    Option("sweeps", dict, None, "options of sweeps by name: {'documents': {'enabled': False}}",
           optional=True),
    Option("schema", str, None, "the PostgreSQL schema of the tables", optional=True),
    Option("auto_migrate", bool, True, "whether tables are made or upgraded at first use"),
    Option("dispatch_timeout", float, 15.0,
           "how long a chord call waits for a database that is away", "s", 0, 3600),
    Option("outcome_timeout", float, 3600.0,
           "how long a worker holds a claim or outcome that the database does not take",
           "s", 0, 604800),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The checked settings of one app; the fields are the options of :data:`OPTIONS`."""

    lease: float
    heartbeat: float
    max_crashes: int
    reap_interval: float
    reap_in_worker: bool
    republish_after: float
    empty_after: float
    publish_grace: float
    dedup_expires: float | None
    batch_size: int
    claim_ahead: int
    inline_results: int
    sweeps: dict[str, Any] | None
    schema: str | None
    auto_migrate: bool
    dispatch_timeout: float
    outcome_timeout: float


def load(conf: Mapping[str, Any]) -> Settings:
    """Check the ``pgbarrier_*`` keys of *conf* (an ``app.conf``) and return them.

    Raises:
        ConfigurationError: an unknown key (the nearest valid one is named), a value of the wrong
            type or out of bounds, a heartbeat above a third of the lease, a schema that cannot be
            one, or options of a sweep that are none.
    """
    _refuse_unknown(conf)
    values = {option.name: option.check(conf.get(option.key, option.default)) for option in OPTIONS}
    settings = Settings(**values)
    if settings.heartbeat > settings.lease / 3:
        raise ConfigurationError(
            f"pgbarrier_heartbeat ({settings.heartbeat:g} s) must be at most a third of "
            f"pgbarrier_lease ({settings.lease:g} s): lower the one or raise the other"
        )
    if settings.schema is not None and not re.fullmatch(r'[^"\x00]{1,63}', settings.schema):
        raise ConfigurationError(
            f"pgbarrier_schema is not the name of a schema: {settings.schema!r}: use 1 to 63 "
            "characters without quotation marks, or None for the search path's first"
        )
    for name, options in (settings.sweeps or {}).items():
        if not isinstance(options, Mapping):
            raise ConfigurationError(
                f"pgbarrier_sweeps[{name!r}] must be a dict of options, such as "
                f"{{'enabled': False}}, got {options!r}"
            )
    return settings


def _refuse_unknown(conf: Mapping[str, Any]) -> None:
    known = [option.key for option in OPTIONS]
    for key in conf:
        name = str(key).lower()
        if PREFIX in name:  # a configuration namespace stands before the prefix
            name = name[name.index(PREFIX) :]
        if not name.startswith(PREFIX) or name in known:
            continue
        near = difflib.get_close_matches(name, known, 1, 0.0)
        raise ConfigurationError(f"unknown setting {key}: did you mean {near[0]}?")
