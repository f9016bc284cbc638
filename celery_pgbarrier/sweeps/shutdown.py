"""Whether the worker of this process is shutting down; pool children learn it from their parent."""

from __future__ import annotations

import mmap
from typing import Any

from celery.signals import worker_init, worker_shutting_down

# One byte that a forked pool child shares with its parent: Celery tells only the parent that a
# shutdown has begun, and a warm one waits for the children's tasks.
_flag = mmap.mmap(-1, 1)


def stopping() -> bool:
    """Tell whether this process's worker has begun to shut down."""
    return _flag[0] == 1


def _began(**_: Any) -> None:
    _flag[0] = 1


def _fresh(**_: Any) -> None:
    # Another worker that was forked from the same process must not see this one's shutdown.
    global _flag
    _flag = mmap.mmap(-1, 1)


worker_init.connect(_fresh, weak=False)
worker_shutting_down.connect(_began, weak=False)
