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


#: What Celery starts anew for each task of a group that it follows.
_CANVAS = ("chord", "chain", "group")
#: What Celery says of a failure where the header's results are nested.
_JOIN_ERROR = re.compile(r"Join error: ")


def verdict(canvas: Node, theirs: Seen, ours: Seen) -> str | None:
    """Return "agreed", the name of the defect that explains a difference, None for neither."""
    if theirs == ours:
        return AGREED
    theirs = _named(theirs, ours)
    if theirs == ours:
        return UNNAMED
    if _stranded(canvas, theirs, ours):
        return STRANDED
    if _started_twice(canvas, theirs, ours):
        return TWICE
    return None


def _named(theirs: Seen, ours: Seen) -> Seen:
    """Say as ours does that a member failed: by its id, or to a group body its error."""

    def named(outcome: Any, mine: Any) -> Any:
        if isinstance(outcome, list) and isinstance(mine, list) and len(outcome) == len(mine):
            return [named(a, b) for a, b in zip(outcome, mine, strict=True)]
        if not isinstance(outcome, str) or not isinstance(mine, str):
            return outcome
        kind, _, text = mine.removeprefix("FAILURE ").partition(": ")
        if outcome == f"FAILURE ChordError: Join error: {kind}({text!r})":
            return mine
        return _JOIN_ERROR.sub("Dependency <id> raised ", outcome)

    outcomes = [theirs.outcome, *theirs.parents], [ours.outcome, *ours.parents]
    outcome, *parents = named(*outcomes) if len(outcomes[0]) == len(outcomes[1]) else outcomes[0]
    return replace(theirs, outcome=outcome, parents=tuple(parents))


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
        part.ends_in_group() and (at or part.kind != "group") and after.kind in _CANVAS
        for node in canvas.walk()
        if node.kind == "chain"
        for at, (part, after) in enumerate(itertools.pairwise(node.parts))
    )
    pairs = _pairs([theirs.outcome, *theirs.parents], [ours.outcome, *ours.parents])
    refused = all("DispatchConflict" in str(b) for a, b in pairs if a != b)
    ran_more = any(" runs, " in line for line in theirs.told - ours.told)
    return follows and refused and ran_more


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
