"""``self.once(step, function)``: the form of ``self.transaction`` that can try again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any

from celery_pgbarrier.effects import trouble
from celery_pgbarrier.effects.target import Place
from celery_pgbarrier.effects.transaction import Transaction, transaction

logger = logging.getLogger(__name__)

#: The longest pause between two tries (seconds).
_LONGEST = 1.0


def once(
    task: Any,
    step: str,
    function: Callable[[Transaction], Any],
    on: Place | Any = None,
    using: str | None = None,
) -> Any:
    """Do what ``BarrierTask.once`` says, for a running task."""
    settings = getattr(task.backend, "settings", None)
    deadline = time.monotonic() + (settings.dispatch_timeout if settings else 0.0)
    pause = 0.02
    while True:
        try:
            with transaction(task, step, on, using) as tx:
                if not tx.done:
                    tx.set(function(tx))
            return tx.value
        except Exception as error:
            if not trouble.passes(error) or time.monotonic() >= deadline:
                raise
            logger.warning("Step %s of task %s is tried again: %r", step, task.request.id, error)
        time.sleep(pause * (0.5 + random.random()))
        pause = min(pause * 2, _LONGEST)
