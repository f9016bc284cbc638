"""What all sweeps can be told: each option is declared once, with unit, default and bounds."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.settings import Option

#: The setting that overrides options by sweep.
SETTING = "pgbarrier_sweeps"
ENVIRONMENT = "PGBARRIER_SWEEP"


class SweepOption(Option):
    """An option of a sweep, named as the parameter that it is."""

    @property
    def key(self) -> str:
        """The name as it stands in a call."""
        return self.name


OPTIONS = (
    SweepOption("enabled", bool, True, "whether runs do anything"),
    SweepOption("batch_size", int, 1000, "rows per batch, halved after a timeout",
                "rows", 1, 100000),
    SweepOption("max_batches", int, None, "batches per run (and rule)", "", 1, optional=True),
    SweepOption("max_seconds", float, None, "no batch begins later in a run", "s", 0,
                optional=True),
    SweepOption("max_failed", int, 1000, "failed rows after which a run ends", "rows", 1, 10000),
    SweepOption("pause", float, 0.0, "between two batches", "s", 0, 3600),
    SweepOption("lock_timeout", float, 5.0, "how long a batch waits for a lock; 0: for ever",
                "s", 0, 3600, optional=True),
    SweepOption("statement_timeout", float, 30.0, "how long a statement may run; 0: for ever",
                "s", 0, 86400, optional=True),
    SweepOption("lease", float, 60.0, "how long the turn of a run that died stays taken",
                "s", 0.1, 86400),
)  # fmt: skip


class OptionValues(TypedDict, total=False):
    """The options as parameters."""

    enabled: bool
    batch_size: int
    max_batches: int | None
    max_seconds: float | None
    max_failed: int
    pause: float
    lock_timeout: float | None
    statement_timeout: float | None
    lease: float


@dataclass(frozen=True)
class Options:
    """The checked options of one run; the fields are those of :data:`OPTIONS`."""

    enabled: bool
    batch_size: int
    max_batches: int | None
    max_seconds: float | None
    max_failed: int
    pause: float
    lock_timeout: float | None
    statement_timeout: float | None
    lease: float


def check(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return option values in their types.

    Raises:
        ConfigurationError: an unknown name (the nearest is given) or a bad value; *where* tells
            the reader where it stands.
    """
    known = {option.name: option for option in OPTIONS}
    checked = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)
            raise ConfigurationError(f"{where}: no option {name!r}, did you mean {near[0]!r}?")
        try:
            checked[name] = known[name].check(value)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from None
    return checked


def resolve(name: str, layers: Iterable[Mapping[str, Any]]) -> Options:
    """Return a sweep's options: the defaults, then what each layer overrides."""
    values = {option.name: option.default for option in OPTIONS}
    for layer in layers:
        values.update(layer)
    return Options(**values)


def from_settings(name: str, conf: Mapping[str, Any], sweeps: Iterable[str]) -> dict[str, Any]:
    """Return what ``app.conf.pgbarrier_sweeps`` says of a sweep.

    Parameters:
        sweeps: the names of all sweeps of the app, so that a name that is none is noticed.

    Raises:
        ConfigurationError: a sweep that there is not, or an option that cannot be used.
    """
    configured = conf.get(SETTING) or {}
    known = set(sweeps) | {name}
    for each in configured:
        if each not in known:
            near = difflib.get_close_matches(str(each), known, 1, 0.0)
            raise ConfigurationError(f"{SETTING}: no sweep {each!r}, did you mean {near[0]!r}?")
    return check(configured.get(name) or {}, f"{SETTING}[{name!r}]")


def from_environment(name: str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return what variables such as ``PGBARRIER_SWEEP_DOCUMENTS_BATCH_SIZE`` say of a sweep.

    Raises:
        ConfigurationError: a value that cannot be used.
    """
    prefix = f"{ENVIRONMENT}_{re.sub(r'[^0-9A-Za-z]+', '_', name).upper()}_"
    found = {}
    for option in OPTIONS:
        variable = prefix + option.name.upper()
        if variable in environ:
            value = {option.name: _parsed(option, environ[variable], variable)}
            found.update(check(value, variable))
    return found


def _parsed(option: Option, text: str, variable: str) -> Any:
    text = text.strip().lower()
    if option.optional and text in ("", "none"):
        return None
    if option.kind is bool:
        values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text not in values:
            raise ConfigurationError(f"{variable} must be true or false, got {text!r}")
        return values[text]
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"{variable} must be a number, got {text!r}") from None
