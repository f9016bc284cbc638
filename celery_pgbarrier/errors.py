"""Everything that celery-pgbarrier raises, in one small tree."""

from __future__ import annotations


class PgBarrierError(Exception):
    """Base class of every error of celery-pgbarrier."""


class ConfigurationError(PgBarrierError):
    """A setting or a URL cannot be used; the message names it and the remedy."""


class SchemaError(PgBarrierError):
    """The tables are missing or behind; the message holds the command that mends it."""


class ServerTooOld(SchemaError):
    """The PostgreSQL server is older than the oldest supported version (13)."""


class DatabaseUnavailable(PgBarrierError):
    """PostgreSQL could not be reached in the time allowed; nothing was committed."""


class DatabaseRetryLater(DatabaseUnavailable):
    """The answer to COMMIT was lost and could not be looked up in the time allowed."""


class DispatchUnknown(PgBarrierError):
    """It is unknown whether a chord was recorded: the answer to COMMIT was lost.

    Look the ids up once PostgreSQL answers again: the chord is either whole or was never there.
    """


class ResultsGone(PgBarrierError):
    """The results of a chord that a task reads by reference are gone."""


class DispatchConflict(PgBarrierError):
    """A chord or task id was used again while its earlier run is still going on."""


class ClaimLost(PgBarrierError):
    """Another run of the task stands: this one may not commit, its transaction is rolled back.

    Let it pass: the attempt ends without an outcome, and nothing that it sends is sent.
    """


class TransactionError(PgBarrierError):
    """``self.transaction()`` is used in a way that cannot be exactly once; the message says how."""


class MemberEndedWithoutResult(PgBarrierError):
    """A chord member raised ``Ignore``: it ended without a result, so its chord cannot complete."""


class TaskPoisoned(PgBarrierError):
    """A task is not run any more; its message is kept and can be put back by hand."""


class TaskCrashed(TaskPoisoned):
    """The process that ran the task died as often as ``pgbarrier_max_crashes`` allows."""


class MessageUnreadable(TaskPoisoned):
    """A worker cannot read the task's message (a content type that it does not accept...)."""


class NeverClaimed(TaskPoisoned):
    """The task's message was published again and again, was taken, and never led to a claim."""


class MessageRefused(TaskPoisoned):
    """The broker refused the task's message again and again (an impossible option, say)."""


class NotPoisoned(PgBarrierError):
    """No task of this id is kept as poison."""


class HolderLost(PgBarrierError):
    """The worker died while it ran a plain task, which is not run again unless ``acks_late``."""
