# A worker of the tests' own application, for tests/cluster (pytest-celery):
#   docker build -f docker/worker.Dockerfile -t celery-pgbarrier-tests .
# Where it runs, PGBARRIER_TEST_BROKER, _BACKEND, _QUEUE and _CONF configure it.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 celery
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY celery_pgbarrier celery_pgbarrier
RUN pip install --no-cache-dir '.[redis]'

WORKDIR /app
COPY tests/__init__.py tests/__init__.py
COPY tests/support tests/support
USER celery
CMD ["celery", "--app=tests.support.app", "worker", "--loglevel=INFO", "--concurrency=2"]
