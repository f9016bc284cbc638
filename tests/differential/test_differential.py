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
        phases=[Phase.generate, Phase.shrink],
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
    with make_sides("redis", kind) as (theirs, ours):

        @bounded
        @given(canvases())
        def agree(canvas: Node) -> None:
            seen = theirs.run(canvas), ours.run(canvas)
            assert ours.left_open() == [], canvas
            name = verdict(canvas, *seen)
            assert name, f"{canvas}: theirs, ours:\n{seen[0].difference(seen[1])}"
            found[name] += canvas not in distinct
            distinct.add(canvas)

        agree()
    assert found[AGREED] > CANVASES / 3
    with capsys.disabled():
        print(f"\n{kind}: {len(distinct)} distinct canvases of {CANVASES}: {dict(found)}")
