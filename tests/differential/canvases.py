"""Random canvases: as trees that can be compared and printed, and as Celery's signatures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from celery import chain, chord, group
from hypothesis import strategies as st

DEPTH = 4
#: More tasks than this are not worth their time.
MOST = 24


@dataclass(frozen=True)
class Node:
    """A canvas.

    ``kind`` is "chain", "group", "chord" (the last part is the body), "replaced" (a task that its
    part replaces), or what a task does: "ok", "fail", "retry" (once), "give up" (retries, then
    fails).  ``errbacks`` holds the arities of the errbacks that are linked to it.
    """

    kind: str
    parts: tuple[Node, ...] = ()
    immutable: bool = False
    lazy: bool = False
    linked: bool = False
    errbacks: tuple[int, ...] = ()

    def size(self) -> int:
        """How many tasks it has."""
        own = self.kind not in ("chain", "group", "chord")
        return own + sum(part.size() for part in self.parts)

    def walk(self) -> Iterator[Node]:
        """The node and all nodes below it."""
        yield self
        for part in self.parts:
            yield from part.walk()

    def ends_in_group(self) -> bool:
        """Whether its result is a list of results."""
        if self.kind in ("chain", "chord"):
            return self.parts[-1].ends_in_group()
        return self.kind == "group"

    def __str__(self) -> str:
        inner = ", ".join(map(str, self.parts))
        marks = "".join(
            [
                "!" if self.immutable else "",
                "~" if self.lazy else "",
                "+" if self.linked else "",
                "".join(f"^{arity}" for arity in self.errbacks),
            ]
        )
        return f"{self.kind}{marks}({inner})" if self.parts else f"{self.kind}{marks}"


# -- as signatures


class Builder:
    """Makes signatures of trees; every task, link and errback gets a label of its own."""

    def __init__(self, tasks: Any, run: int, gather: bool = False) -> None:
        self.t, self.run, self.gather = tasks, run, gather
        self._numbers = itertools.count()

    def label(self, kind: str) -> list[Any]:
        return [self.run, f"{kind}{next(self._numbers)}"]

    def build(self, node: Node) -> Any:
        signature = self._bare(node)
        for arity in node.errbacks:
            errback = self.t.errback1 if arity == 1 else self.t.errback3
            signature.link_error(errback.s(label=self.label("errback")))
        if node.linked:
            signature.link(self.t.link.s(label=self.label("link")))
        return signature

    def _bare(self, node: Node) -> Any:
        parts = [self.build(part) for part in node.parts if node.kind != "replaced"]
        if node.kind == "chain":
            return chain(*parts)
        if node.kind == "group":
            return group(iter(parts) if node.lazy else parts)
        if node.kind == "chord":
            *header, body = parts
            return chord(iter(header) if node.lazy else header, body)
        options: dict[str, Any] = {"label": self.label("task"), "does": node.kind}
        if node.kind == "replaced":
            options["by"] = self._replacement(node.parts[0])
        signature = self.t.work.s(**options)
        return signature.set(immutable=True) if node.immutable else signature

    def _replacement(self, node: Node) -> Any:
        """A replacement; with ``gather``, what ends in a chord's group is made to end in a list.

        Celery does that for groups alone, and leaves the replaced task pending otherwise.
        """
        signature = self.build(node)
        if self.gather and node.kind != "group" and node.ends_in_group():
            signature |= signature.app.tasks["celery.accumulate"].s(index=0)
        return signature


# -- as chance has it


def _errbacks() -> st.SearchStrategy[tuple[int, ...]]:
    return st.sampled_from([(), (), (), (), (1,), (3,), (1, 3)])


_rarely = st.sampled_from([False, False, False, True])
_does = st.sampled_from(["ok", "ok", "ok", "ok", "ok", "ok", "retry", "retry", "fail", "give up"])


def _tasks() -> st.SearchStrategy[Node]:
    return st.builds(Node, _does, immutable=_rarely, linked=_rarely, errbacks=_errbacks())


@st.composite
def _nodes(draw: Any, depth: int) -> Node:
    if depth == 1:
        return draw(_tasks())
    kind = draw(st.sampled_from(["task", "task", "chain", "group", "chord", "chord", "replaced"]))
    inner = _nodes(depth - 1)
    if kind == "task":
        return draw(_tasks())
    if kind == "replaced":
        return Node(kind, (draw(inner),), draw(_rarely), errbacks=draw(_errbacks()))
    parts = draw(st.lists(inner, min_size=1 if kind == "group" else 2, max_size=3))
    linked = kind != "group" and draw(_rarely)
    lazy = kind == "chord" and draw(_rarely)
    return Node(kind, tuple(parts), lazy=lazy, linked=linked, errbacks=draw(_errbacks()))


def canvases() -> st.SearchStrategy[Node]:
    """Canvases of at most ``DEPTH`` levels, the outermost of which is no mere task."""
    return _nodes(DEPTH).filter(lambda node: node.parts and node.size() <= MOST)
