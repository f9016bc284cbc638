"""Random canvases come to the same on Celery's Redis backend and on ours.

``PGBARRIER_TEST_CANVASES`` is how many are made (60); ``PGBARRIER_TEST_SEED`` makes others than the
same ones each time. The long run, which ends with what it counted::

    PGBARRIER_TEST_CANVASES=3000 .venv/bin/python -m pytest tests/differential -s --timeout=7200
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.differential.canvases import Node, canvases
from tests.differential.rules import AGREED, verdict
from tests.differential.running import Side

pytestmark = [
    # What Celery's Redis backend uses of its client.
    pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header"),
    pytest.mark.filterwarnings("ignore:Exception raised outside body"),
]

CANVASES = int(os.environ.get("PGBARRIER_TEST_CANVASES", "60"))
SEED = os.environ.get("PGBARRIER_TEST_SEED")


MakeSides = Callable[..., AbstractContextManager[list[Side]]]


def bounded(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with so many canvases as are asked for, the same each time unless seeded."""
    options = settings(
        max_examples=CANVASES,
        derandomize=SEED is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    return options(test if SEED is None else seed(int(SEED))(test))


@pytest.mark.slow
@pytest.mark.timeout(max(180, CANVASES * 5))
@pytest.mark.parametrize("kind", ["claimed", "plain"])
def test_canvases_agree(
    make_sides: MakeSides, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outcome, values and their order, tasks that ran, links and errbacks, and their numbers."""
    found: Counter[str] = Counter()
    distinct: set[Node] = set()
    wrong: list[tuple[int, str]] = []  # all of them: the smallest is the one to look at
    with make_sides("redis", kind) as (theirs, ours):

        @bounded
        @given(canvases())
        def compare(canvas: Node) -> None:
            if canvas in distinct:
                return
            distinct.add(canvas)
            seen = theirs.run(canvas), ours.run(canvas)
            left, name = ours.left_open(), verdict(canvas, *seen)
            if name and not left:
                found[name] += 1
            else:
                difference = seen[0].difference(seen[1])
                wrong.append((canvas.size(), f"{canvas}: theirs, ours:\n{difference}\n{left}"))

        compare()
    with capsys.disabled():
        print(f"\n{kind}: {len(distinct)} canvases, no two alike: {dict(found)}")
    assert not wrong, f"{len(wrong)} disagree, such as\n" + "\n".join(
        text for _, text in sorted(wrong)[:5]
    )
    assert found[AGREED] > len(distinct) / 3
