"""Bodies in header messages: a stub stands for what the barrier's row holds whole.

Celery embeds the whole body in the message of each member (``chord``), and in those of the later
steps of a chain.  Here nothing but its being there, and its ids, is needed: the release takes the
body from the barrier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: What is left of a canvas in a stub: enough for Celery to make a signature of it.
_CANVASES: dict[str, Callable[[], dict[str, Any]]] = {
    "group": lambda: {"tasks": []},
    "chain": lambda: {"tasks": []},
    "chord": lambda: {"header": [], "body": None, "kwargs": {}},
}
_PARTS = ("tasks", "header", "body")
_SCALARS = (str, int, float, bool)


def of_body(body: Any) -> Any:
    """Return a body's stub: a valid signature with its name, ids and immutability.

    Options that are no scalars (links, errbacks, headers) stay with the barrier; a body that is
    itself a member of a chord keeps the stub of that one's body.
    """
    if not isinstance(body, Mapping):
        return body
    kind = body.get("subtask_type")
    options = body.get("options") or {}
    kept = {key: value for key, value in options.items() if isinstance(value, _SCALARS)}
    if options.get("chord"):
        kept["chord"] = of_body(options["chord"])
    empty = _CANVASES.get(str(kind))
    return {
        "task": body["task"],
        "args": [],
        "kwargs": empty() if empty else {},
        "options": kept,
        "subtask_type": kind if empty else None,
        "immutable": body.get("immutable", False),
    }


def in_embed(embed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the last part of a message's body with stubs for the bodies of chords."""
    result = dict(embed)
    if result.get("chord"):
        result["chord"] = of_body(result["chord"])
    if result.get("chain"):
        result["chain"] = [_in_step(step) for step in result["chain"]]
    return result


def _in_step(step: Any) -> Any:
    """Return a chain's step, of whatever shape, with stubs; the step itself is not changed."""
    if isinstance(step, list):
        return [_in_step(task) for task in step]
    if not isinstance(step, Mapping):
        return step
    kwargs, options = step.get("kwargs") or {}, step.get("options") or {}
    changed: dict[str, Any] = {}
    if options.get("chord"):
        changed["options"] = {**options, "chord": of_body(options["chord"])}
    if step.get("subtask_type") in _CANVASES:
        parts = {key: _in_step(kwargs[key]) for key in _PARTS if key in kwargs}
        changed["kwargs"] = {**kwargs, **parts}
    return {**step, **changed} if changed else step
