"""The application of one peer, configured by environment variables (see ``benchmarks.peers``)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from celery import Celery


def create_app(environ: Mapping[str, str] = os.environ) -> Celery:
    """The peer's application; the database of Django's is in ``benchmarks.django_settings``."""
    if "DJANGO_SETTINGS_MODULE" in environ:
        import django

        django.setup()
    ours = environ.get("BENCH_PEER") == "pgbarrier"
    app = Celery(
        "bench",
        broker=environ.get("PGBARRIER_TEST_BROKER", "memory://"),
        backend=environ.get("PGBARRIER_TEST_BACKEND", "disabled://"),
        task_cls="celery_pgbarrier:BarrierTask" if ours else None,
        include=["benchmarks.tasks"],
    )
    app.conf.update(
        task_default_queue=environ.get("PGBARRIER_TEST_QUEUE", "celery"),
        broker_connection_retry_on_startup=True,
    )
    app.conf.update(json.loads(environ.get("PGBARRIER_TEST_CONF", "{}")))
    return app


app = create_app()
