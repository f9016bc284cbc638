"""What this package costs beside Celery's own backends: ``python -m benchmarks.bench --help``."""
