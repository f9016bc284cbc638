"""What is not run on ours, and where ours differs, each with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Tests, by a regular expression over their names, and a reason that holds for all of them."""

    tests: str
    reason: str


#: Tests that look into Redis or into the classes of Celery's own backends.
LEFT_OUT = (
    Entry(
        r"::test_chord_on_error$",
        "reads the members' results from the Redis key of the chord",
    ),
    Entry(
        r"::test_redis_subscribed_channels_leak$",
        "counts the channels that Redis clients are subscribed to; expected to fail on Redis too",
    ),
    Entry(
        r"::test_asyncresult_(forget|get)_cancels_subscription$",
        "looks for the Redis channel of a result; ours has no subscriptions",
    ),
    Entry(
        r"::test_simple_chord_with_a_delay_in_group_save$",
        "replaces a private method of Celery's key/value backends",
    ),
)

#: Tests that pass on Celery's Redis backend and not on ours.
DIFFERENCES = (
    Entry(
        r"::test_chord::test_generator\[",
        "wants the first member run while the header's generator is still being read; a chord call "
        "is atomic here, so nothing is published before the generator has ended",
    ),
    Entry(
        r"::test_nested_chord_header_link_error$",
        "counts one errback, that of the inner chord, because Redis leaves the outer chord pending "
        "for ever; ours fails the outer chord too, and so calls its errback as well",
    ),
    Entry(
        r"::test_chord_header_id_duplicated_on_rabbitmq_msg_duplication\[",
        "publishes a task twice and wants it run twice; a duplicate is dropped here",
    ),
    Entry(
        r"^test_group_chains\.py::.*-1\]$",
        "sets task_protocol = 1, whose messages have no headers: without the stamp in them a "
        "duplicate cannot be told from a new call, so ours refuses the setting",
    ),
    Entry(
        r"::test_nested_group_chord_body_chain$",
        "in Celery 5.5 and 5.6 wants the group's result never to arrive, a defect of its own that "
        "it names (issue 6734); here it arrives",
    ),
)


def left_out() -> list[tuple[str, str]]:
    """Return what is not run on ours, as pairs of regular expression and reason."""
    return [(entry.tests, entry.reason) for entry in LEFT_OUT]


def explanation(test: str) -> str | None:
    """Return why a test does not pass on ours, None where that is not known."""
    entries = (*LEFT_OUT, *DIFFERENCES)
    return next((entry.reason for entry in entries if re.search(entry.tests, test)), None)
