"""``self.transaction()``: the user's writes, committed once with a marker of their step."""

from celery_pgbarrier.effects.once import once
from celery_pgbarrier.effects.target import Place
from celery_pgbarrier.effects.transaction import Transaction, transaction

__all__ = ["Place", "Transaction", "once", "transaction"]
