"""Durable Celery chords and results on PostgreSQL.

PostgreSQL is the source of truth, the broker only delivers.
"""

from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.beat import beat_schedule
from celery_pgbarrier.effects import Transaction
from celery_pgbarrier.errors import (
    ClaimLost,
    ConfigurationError,
    DatabaseUnavailable,
    DispatchConflict,
    DispatchUnknown,
    HolderLost,
    MemberEndedWithoutResult,
    MessageRefused,
    MessageUnreadable,
    NeverClaimed,
    NotPoisoned,
    PgBarrierError,
    ResultsGone,
    SchemaError,
    TaskCrashed,
    TaskPoisoned,
    TransactionError,
)
from celery_pgbarrier.poison import task_poisoned
from celery_pgbarrier.reference import LazyResults
from celery_pgbarrier.task import BarrierTask

__version__ = "0.1.0"

__all__ = [
    # what an app uses
    "BarrierBackend",
    "BarrierTask",
    "Transaction",
    "LazyResults",
    "beat_schedule",
    "task_poisoned",
    # errors
    "ClaimLost",
    "ConfigurationError",
    "DatabaseUnavailable",
    "DispatchConflict",
    "DispatchUnknown",
    "HolderLost",
    "MemberEndedWithoutResult",
    "MessageRefused",
    "MessageUnreadable",
    "NeverClaimed",
    "NotPoisoned",
    "PgBarrierError",
    "ResultsGone",
    "SchemaError",
    "TaskCrashed",
    "TaskPoisoned",
    "TransactionError",
]
