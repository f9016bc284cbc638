"""How things are kept: nothing here imports Celery, and only ``database`` commits."""
