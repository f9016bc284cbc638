"""Canvases by name, and what they come to: for every backend, pool and broker.

Each is made by a function of whoever runs it: ``w.t`` holds the tasks, ``w.path`` a file for notes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from celery import chain, chord, group


class Maker(Protocol):
    """What a canvas is made of."""

    t: Any
    path: Path


Canvas = Callable[[Maker], Any]

#: What canvases come to.
VALUES: dict[str, tuple[Canvas, Any]] = {
    "task body": (
        lambda w: chord([w.t.add.s(1, 1), w.t.add.s(2, 2)], w.t.xsum.s()),
        6,
    ),
    "one member": (lambda w: chord([w.t.add.s(1, 1)], w.t.xsum.s()), 2),
    "header order": (
        lambda w: chord([w.t.identity.s(n) for n in range(20)], w.t.identity.s()),
        list(range(20)),
    ),
    "chain body": (
        lambda w: chord([w.t.add.s(1, 1), w.t.add.s(2, 2)], w.t.xsum.s() | w.t.add.s(10)),
        16,
    ),
    "group body": (
        lambda w: chord([w.t.add.s(1, 1), w.t.add.s(2, 2)], group(w.t.xsum.s(), w.t.identity.s())),
        [6, [2, 4]],
    ),
    "chord body": (
        lambda w: chord(
            [w.t.add.s(1, 1), w.t.add.s(2, 2)],
            chord([w.t.xsum.s(), w.t.xsum.s()], w.t.identity.s()),
        ),
        [6, 6],
    ),
    "body with its own arguments": (
        lambda w: chord([w.t.add.s(1, 1)], w.t.echo.s("more", key="value")),
        {"args": [[2], "more"], "kwargs": {"key": "value"}},
    ),
    "immutable body": (
        lambda w: chord([w.t.add.s(1, 1)], w.t.echo.si("alone")),
        {"args": ["alone"], "kwargs": {}},
    ),
    "chord in a header": (
        lambda w: chord(
            [chord([w.t.add.s(1, 1), w.t.add.s(2, 2)], w.t.xsum.s()), w.t.add.s(10, 10)],
            w.t.identity.s(),
        ),
        [6, 20],
    ),
    "three chords deep": (
        lambda w: chord(
            [
                chord([chord([w.t.add.s(1, 1)], w.t.xsum.s()), w.t.add.s(2, 2)], w.t.xsum.s()),
                w.t.add.s(3, 3),
            ],
            w.t.identity.s(),
        ),
        [6, 6],
    ),
    "chain in a header": (
        lambda w: chord([w.t.add.s(1, 1) | w.t.add.s(10), w.t.add.s(2, 2)], w.t.identity.s()),
        [12, 4],
    ),
    "long chain in a header": (
        lambda w: chord(
            [w.t.add.s(1, 1) | w.t.add.s(1) | w.t.add.s(1) | w.t.add.s(1), w.t.add.s(2, 2)],
            w.t.identity.s(),
        ),
        [5, 4],
    ),
    "group in a header": (
        lambda w: chord(
            [group(w.t.add.s(1, 1), w.t.add.s(2, 2)), w.t.add.s(3, 3)], w.t.identity.s()
        ),
        [4, 2, 6],  # sic
    ),
    "groups in a group in a header": (
        lambda w: chord(
            [group(group(w.t.add.s(1, 1), w.t.add.s(2, 2)), w.t.add.s(3, 3)), w.t.add.s(4, 4)],
            w.t.identity.s(),
        ),
        [6, 4, 2, 8],  # sic
    ),
    "a group of chains in a header": (
        lambda w: chord(
            [group(w.t.add.s(1, 1) | w.t.add.s(1), w.t.add.s(2, 2) | w.t.add.s(1))],
            w.t.flat_sum.s(),
        ),
        8,
    ),
    "chain that ends in a group in a header": (
        lambda w: chord(
            [chain(w.t.add.s(1, 1), group(w.t.add.s(1), w.t.add.s(2))), w.t.add.s(5, 5)],
            w.t.flat_sum.s(),
        ),
        17,
    ),
    "chain with a group inside in a header": (
        lambda w: chord(
            [
                chain(w.t.add.s(1, 1), group(w.t.add.s(1), w.t.add.s(2)), w.t.xsum.s()),
                w.t.add.s(5, 5),
            ],
            w.t.identity.s(),
        ),
        [7, 10],
    ),
    "chain that ends in a chord in a header": (
        lambda w: chord(
            [
                chain(w.t.add.s(1, 1), chord([w.t.add.s(1), w.t.add.s(2)], w.t.xsum.s())),
                w.t.add.s(5, 5),
            ],
            w.t.identity.s(),
        ),
        [7, 10],
    ),
    "generator header": (
        lambda w: chord((w.t.add.s(n, n) for n in range(5)), w.t.identity.s()),
        [0, 2, 4, 6, 8],
    ),
    "generator of chains": (
        lambda w: chord((w.t.add.s(n, n) | w.t.add.s(1) for n in range(3)), w.t.identity.s()),
        [1, 3, 5],
    ),
    "empty header": (lambda w: chord([], w.t.identity.s()), []),
    "empty header, chain body": (
        lambda w: chord([], w.t.xsum.s() | w.t.add.s(1)),
        1,
    ),
    "group then task": (
        lambda w: chain(group(w.t.add.s(1, 1), w.t.add.s(2, 2)), w.t.xsum.s()),
        6,
    ),
    "task, group, task, task": (
        lambda w: chain(
            w.t.add.s(1, 1), group(w.t.add.s(1), w.t.add.s(2)), w.t.xsum.s(), w.t.add.s(100)
        ),
        107,
    ),
    "group, group, task": (
        lambda w: chain(
            group(w.t.add.s(1, 1), w.t.add.s(2, 2)),
            group(w.t.xsum.s(), w.t.xsum.s()),
            w.t.xsum.s(),
        ),
        12,
    ),
    "chord, then task": (
        lambda w: chain(chord([w.t.add.s(1, 1)], w.t.xsum.s()), w.t.add.s(1)),
        3,
    ),
    "chord, then group": (
        lambda w: chain(
            chord([w.t.add.s(1, 1)], w.t.xsum.s()), group(w.t.add.s(1), w.t.add.s(2))
        ),
        [3, 4],
    ),
    "two chords in a group": (
        lambda w: group(
            chord([w.t.add.s(1, 1)], w.t.xsum.s()), chord([w.t.add.s(2, 2)], w.t.xsum.s())
        ),
        [2, 4],
    ),
    "a member that is replaced by a chord": (
        lambda w: chord(
            [
                w.t.replaced.s(chord([w.t.add.s(1, 1), w.t.add.s(2, 2)], w.t.xsum.s())),
                w.t.add.s(5, 5),
            ],
            w.t.identity.s(),
        ),
        [6, 10],
    ),
    "a member that retries": (
        lambda w: chord([w.t.retry_until.s(7, 3), w.t.add.s(1, 1)], w.t.identity.s()),
        [7, 2],
    ),
    "a body that retries": (
        lambda w: chord([w.t.add.s(1, 1)], w.t.retry_until.s(2)),
        [2],
    ),
    "a body that is replaced": (
        lambda w: chord([w.t.add.s(1, 1)], w.t.replaced.si(w.t.add.s(40, 2))),
        42,
    ),
}  # fmt: skip

#: What the links of a canvas are told.
LINKS: dict[str, tuple[Canvas, list[str]]] = {
    "link of a member": (
        lambda w: chord(
            [w.t.add.s(1, 1).on_error(w.t.fail.s()).set(link=w.t.noted.s(str(w.path)))],
            w.t.xsum.s(),
        ),
        ["2"],
    ),
    "link of the body": (
        lambda w: chord([w.t.add.s(1, 1)], w.t.xsum.s().set(link=w.t.noted.s(str(w.path)))),
        ["2"],
    ),
    "two links of the body": (
        lambda w: chord(
            [w.t.add.s(1, 1)],
            w.t.xsum.s().set(link=[w.t.noted.s(str(w.path)), w.t.noted.s(str(w.path))]),
        ),
        ["2", "2"],
    ),
    "link of a chord": (
        lambda w: _linked(chord([w.t.add.s(1, 1)], w.t.xsum.s()), w.t.noted.s(str(w.path))),
        ["2"],
    ),
    "link of a body that is a chain": (
        lambda w: chord(
            [w.t.add.s(1, 1)],
            chain(w.t.xsum.s(), w.t.add.s(1).set(link=w.t.noted.s(str(w.path)))),
        ),
        ["3"],
    ),
}  # fmt: skip


def _linked(canvas: Any, link: Any) -> Any:
    canvas.link(link)
    return canvas


#: Chords whose header fails, each for another reason; the error says "as told".
ERRORS: dict[str, Canvas] = {
    "the only member": lambda w: chord([w.t.fail.s()], w.t.xsum.s()),
    "one of three": lambda w: chord([w.t.add.s(1, 1), w.t.fail.s(), w.t.add.s(2, 2)], w.t.xsum.s()),
    "two of three": lambda w: chord([w.t.fail.s(), w.t.fail.s(), w.t.add.s(2, 2)], w.t.xsum.s()),
    "the first step of a chain": lambda w: chord(
        [w.t.fail.s() | w.t.add.s(1), w.t.add.s(2, 2)], w.t.xsum.s()
    ),
    "the last step of a chain": lambda w: chord(
        [w.t.add.s(1, 1) | w.t.fail.si(), w.t.add.s(2, 2)], w.t.xsum.s()
    ),
    "a member of a group": lambda w: chord(
        [group(w.t.fail.s(), w.t.add.s(1, 1)), w.t.add.s(2, 2)], w.t.flat_sum.s()
    ),
    "a member of an inner chord": lambda w: chord(
        [chord([w.t.fail.s(), w.t.add.s(1, 1)], w.t.xsum.s()), w.t.add.s(2, 2)], w.t.xsum.s()
    ),
    "the body of an inner chord": lambda w: chord(
        [chord([w.t.add.s(1, 1)], w.t.fail.si()), w.t.add.s(2, 2)], w.t.xsum.s()
    ),
    "before an inner chord": lambda w: chord(
        [chain(w.t.fail.s(), chord([w.t.add.si(1, 1)], w.t.xsum.s())), w.t.add.s(2, 2)],
        w.t.xsum.s(),
    ),
    "before a group that ends a chain": lambda w: chord(
        [chain(w.t.fail.s(), group(w.t.add.s(1), w.t.add.s(2))), w.t.add.s(2, 2)], w.t.flat_sum.s()
    ),
    "a chord before a group that ends a chain": lambda w: chord(
        [
            chain(
                chord([w.t.fail.s()], w.t.xsum.s()), w.t.add.s(1), group(w.t.add.s(1), w.t.add.s(2))
            ),
            w.t.add.s(2, 2),
        ],
        w.t.flat_sum.s(),
    ),
    "a member of a generator": lambda w: chord(
        (w.t.fail.s() for _ in range(2)), w.t.xsum.s()
    ),
}  # fmt: skip


#: Where Celery's Redis backend leaves the outer chord waiting for ever, and we do not.
STRANDED_BY_CELERY = {
    "a member of an inner chord",
    "before a group that ends a chain",
    "a chord before a group that ends a chain",
}
