"""What agreement means, and the named defects of Celery's Redis backend that are allowed for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from celery import states

from tests.differential.canvases import Node
from tests.differential.running import Seen

AGREED = "agreed"
STRANDED = "Celery strands a chord"
UNNAMED = "Celery does not name the member of a nested header that failed"
TWICE = "Celery starts a step after a group body once for each member"


#: What Celery says of a failure where the header's results are nested.
_JOIN_ERROR = re.compile(r"Join error: ")


def verdict(canvas: Node, theirs: Seen, ours: Seen) -> str | None:
    """Return "agreed", the name of the defect that explains a difference, None for neither."""
    if theirs == ours:
        return AGREED
    theirs = _named(theirs)
    if theirs == ours:
        return UNNAMED
    if _stranded(canvas, theirs, ours):
        return STRANDED
    if _started_twice(canvas, theirs, ours):
        return TWICE
    return None


def _named(seen: Seen) -> Seen:
    """Say as ours would that a member of a header failed."""

    def named(outcome: Any) -> Any:
        if isinstance(outcome, list):
            return [named(part) for part in outcome]
        if isinstance(outcome, str):
            return _JOIN_ERROR.sub("Dependency <id> raised ", outcome)
        return outcome

    parents = tuple(named(parent) for parent in seen.parents)
    return replace(seen, outcome=named(seen.outcome), parents=parents)


def _stranded(canvas: Node, theirs: Seen, ours: Seen) -> bool:
    """Tell whether theirs only lacks the failures, and the errbacks, of chords that never end.

    Where the header of an inner chord fails, Celery does not tell the outer one.
    """
    fails = any(node.kind in ("fail", "give up") for node in canvas.walk())
    pairs = [*_pairs([theirs.outcome, *theirs.parents], [ours.outcome, *ours.parents])]
    waits = [(a, b) for a, b in pairs if a != b]
    only_failures = all(_pending(a) and _failed(b) for a, b in waits)
    more = ours.told - theirs.told
    only_errbacks = not theirs.told - ours.told and all(line.startswith("errback") for line in more)
    return fails and bool(waits) and only_failures and only_errbacks


def _started_twice(canvas: Node, theirs: Seen, ours: Seen) -> bool:
    """Tell whether ours refused to start a chord again that runs.

    Celery sends the chord that follows a chord with a group body once for each task of that group,
    with the same ids.
    """
    follows = any(
        before.kind != "group" and before.ends_in_group() and after.kind in ("chord", "chain")
        for node in canvas.walk()
        if node.kind == "chain"
        for before, after in itertools.pairwise(node.parts)
    )
    pairs = _pairs([theirs.outcome, *theirs.parents], [ours.outcome, *ours.parents])
    refused = [b for a, b in pairs if a != b]
    return follows and bool(refused) and all("DispatchConflict" in str(b) for b in refused)


def _pairs(theirs: Any, ours: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for a, b in zip(theirs, ours, strict=True):
            yield from _pairs(a, b)
    else:
        yield theirs, ours


def _pending(outcome: Any) -> bool:
    return bool(outcome == (states.PENDING, None))


def _failed(outcome: Any) -> bool:
    return isinstance(outcome, str) and outcome.startswith(states.FAILURE)
