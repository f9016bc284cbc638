"""Every statement, named, with a line of purpose.  ``{s}`` stands for the schema prefix.

A column that has an index is compared with ``(SELECT clock_timestamp())``: the function alone is
volatile, and an index is not searched by what is volatile, but read from end to end.
"""

from celery_pgbarrier.store.sql.barriers import *
from celery_pgbarrier.store.sql.batches import *
from celery_pgbarrier.store.sql.claims import *
from celery_pgbarrier.store.sql.effects import *
from celery_pgbarrier.store.sql.functions import *
from celery_pgbarrier.store.sql.messages import *
from celery_pgbarrier.store.sql.outcomes import *
from celery_pgbarrier.store.sql.poison import *
from celery_pgbarrier.store.sql.purge import *
from celery_pgbarrier.store.sql.repair import *
from celery_pgbarrier.store.sql.results import *
from celery_pgbarrier.store.sql.statements import Statements as Statements
from celery_pgbarrier.store.sql.workers import *
