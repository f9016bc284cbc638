"""Messages that are committed with the rows they belong to, and published after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from celery_pgbarrier import capture, outbox, writing
from celery_pgbarrier.sweeps.tables import Key
from celery_pgbarrier.unit import Host, Unit


@dataclass(frozen=True)
class Letter:
    """What is sent for one row."""

    key: Key
    row: Any
    unit: Unit


def caught(key: Key, row: Any, send: Callable[[Any], Any]) -> Letter:
    """Call *send* with a row and keep the task messages that it sends."""
    unit = Unit()
    with capture.into(unit):
        send(row)
    return Letter(key, row, unit)


def bundle(letters: Sequence[Letter]) -> Unit:
    """Return one unit with the messages of all letters."""
    unit = Unit()
    for letter in letters:
        unit.events += letter.unit.events
        unit.sent_events += letter.unit.sent_events
    return unit


def write(connection: Connection, host: Host, letters: Sequence[Letter]) -> None:
    """Record the messages of letters in the transaction of *connection*.

    Raises:
        DispatchConflict: a task id is in use by another call.
    """
    unit = bundle(letters)
    if unit.events:
        writing.write(connection, host, unit)


def publish(host: Host, letters: Sequence[Letter]) -> None:
    """Publish what was committed; what the broker does not take, the reaper publishes."""
    outbox.publish(host, bundle(letters))
