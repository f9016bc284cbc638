"""Batch-committed purge, bounded expiry and stale-job revival over the user's own tables.

Declare a sweep over a mapped class or a Core table, ``register`` it with the app, and schedule
its ``beat_entry``; or call ``run(engine)``.
"""

from celery_pgbarrier.sweeps.base import Sweep
from celery_pgbarrier.sweeps.claim import Claim, Claimed
from celery_pgbarrier.sweeps.counts import Counts, Failure, Stop
from celery_pgbarrier.sweeps.expire import Expire
from celery_pgbarrier.sweeps.family import Family, Inserted
from celery_pgbarrier.sweeps.purge import Purge, SoftDelete
from celery_pgbarrier.sweeps.revive import Revive, Rule

__all__ = [
    # sweeps
    "Expire",
    "Purge",
    "Revive",
    "Rule",
    "SoftDelete",
    "Sweep",
    # what a run did
    "Counts",
    "Failure",
    "Stop",
    # jobs of the user's own
    "Claim",
    "Claimed",
    "Family",
    "Inserted",
]
