"""Django as django-celery-results needs it, with Django's defaults."""

from __future__ import annotations

import os

from sqlalchemy import make_url

_url = make_url(os.environ["BENCH_DATABASE"])

SECRET_KEY = "bench"
USE_TZ = True
INSTALLED_APPS = ["django.contrib.contenttypes", "django_celery_results"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.database,
        "USER": _url.username,
        "PASSWORD": _url.password or "",
        "HOST": _url.host,
        "PORT": _url.port,
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
