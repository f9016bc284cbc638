"""A Celery application that is configured by environment variables alone.

``PGBARRIER_TEST_BROKER``, ``PGBARRIER_TEST_BACKEND``, ``PGBARRIER_TEST_QUEUE``, and
``PGBARRIER_TEST_CONF``: more settings, as a JSON object. Workers load this module; a test gets an
equal application from the ``make_app`` fixture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from celery import Celery

TASK_CLS = "celery_pgbarrier:BarrierTask"

#: Settings under which a crash is noticed and mended in seconds.
FAST_RECOVERY = {
    "pgbarrier_lease": 3.0,
    "pgbarrier_heartbeat": 0.5,
    "pgbarrier_reap_interval": 0.5,
    "pgbarrier_republish_after": 2.0,
    "pgbarrier_publish_grace": 1.0,
}


def create_app(environ: Mapping[str, str] = os.environ) -> Celery:
    """A new application, which becomes the current one."""
    app = Celery(
        "tests",
        broker=environ.get("PGBARRIER_TEST_BROKER", "memory://"),
        backend=environ.get("PGBARRIER_TEST_BACKEND", "disabled://"),
        task_cls=TASK_CLS,
        include=["tests.support.tasks"],
    )
    app.conf.update(
        task_default_queue=environ.get("PGBARRIER_TEST_QUEUE", "celery"),
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
    )
    app.conf.update(json.loads(environ.get("PGBARRIER_TEST_CONF", "{}")))
    return app


app = create_app()
