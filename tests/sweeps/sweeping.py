"""The app of workers that are killed: a marked purge of documents with files."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from celery_pgbarrier.sweeps import Purge
from tests.support.app import create_app
from tests.sweeps.models import Document

app = create_app()


def remove_file(document: Any) -> None:
    """Remove a document's file; slow enough to be interrupted."""
    Path(document.path).unlink(missing_ok=True)
    threading.Event().wait(float(os.environ.get("SWEEPING_PAUSE", "0")))


purge = Purge(
    "documents",
    Document,
    where=Document.deleted_at.is_not(None),
    mark={"status": "purging"},
    before_delete=remove_file,
    batch_size=50,
    lease=0.2,
)
purge.register(app)
