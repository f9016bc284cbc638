"""Celery's own integration suite, run against this package: ``make conformance``.

Nothing of Celery's is kept here.  Its source distribution is downloaded by version, its suite is
run with a pytest plugin of ours, once for each broker, backend and file, and what differs between
the backends is named.
"""
