"""Messages as they are recorded."""

from __future__ import annotations

from typing import Any

import pytest

from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.unit import Stamp

CELERYS = {
    "lang": "py", "task": "proj.add", "id": "an id", "shadow": None, "eta": None, "expires": None,
    "group": "g", "group_index": 3, "retries": 0, "timelimit": [None, None], "root_id": "an id",
    "parent_id": None, "argsrepr": "('\u00e9',)", "kwargsrepr": "{}", "origin": "gen1@host",
    "ignore_result": False, "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {},
}  # fmt: skip
STAMPED = {**CELERYS, "pgb": Stamp("a-call", 2, True).header("an id")}


@pytest.mark.parametrize(
    "headers",
    [
        STAMPED,
        CELERYS,
        {**STAMPED, "traceparent": "00-1", "compression": "application/x-gzip"},
        {"id": "an id", "task": "foreign"},
        {"pgb": {"id": "another"}, **CELERYS},
    ],
    ids=["Celery's", "unstamped", "with others", "foreign", "in another order"],
)
def test_a_recorded_message_is_read_as_it_was(headers: dict[str, Any]) -> None:
    properties = {"delivery_mode": 2, "priority": 3, "expiration": 1.5, "reply_to": "r"}
    body = b'[[1], {}, {"chord": null}]\nwith a second line \x00\xff'
    envelope = Envelope(body, "application/json", "utf-8", "", "q", headers, ["q"], properties)
    assert Envelope.decode(envelope.encode()) == envelope


def test_names_of_headers_are_not_recorded() -> None:
    envelope = Envelope(b"", "application/json", "utf-8", "", "q", STAMPED, ["q"], {})
    assert b"replaced_task_nesting" not in envelope.encode()
    assert len(envelope.encode()) < 350


def test_a_stamp_is_read_as_it_was_written() -> None:
    stamp = Stamp("a-call", 2, True, 3)
    assert Stamp.read(stamp.header("an id with spaces")) == ("an id with spaces", stamp)
    assert Stamp.of("an id", stamp.header("an id")) == stamp


@pytest.mark.parametrize(
    "header", [None, "", "rubbish", "a b c d e", {}, {"id": "an id"}, 7, Stamp("c").header("other")]
)
def test_what_is_no_stamp_of_the_task_gives_one_that_is_always_the_same(header: Any) -> None:
    assert Stamp.of("an id", header) == Stamp.of("an id", None)
    assert Stamp.of("an id", header) != Stamp.of("another id", header)


def test_stamps_of_earlier_releases_are_read() -> None:
    """Their messages may wait in queues and rows when the workers are upgraded."""
    old = {"id": "an id", "call": "a-call", "seq": 2, "rec": True, "copy": 0}
    assert Stamp.read(old) == ("an id", Stamp("a-call", 2, True))
    envelope = Envelope(b"", "application/json", "utf-8", "", "q", {**CELERYS, "pgb": old}, ["q"])
    assert Stamp.of("an id", envelope.copied(4).headers["pgb"]) == Stamp("a-call", 2, True, 4)


def test_a_copy_differs_in_its_number_only() -> None:
    envelope = Envelope(b"", "application/json", "utf-8", "", "q", STAMPED, ["q"])
    assert Stamp.of("an id", envelope.copied(4).headers["pgb"]) == Stamp("a-call", 2, True, 4)
