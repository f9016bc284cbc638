"""A small application to run in containers: ``celery -A proj worker``."""

from proj.celery import app

__all__ = ["app"]
