"""Documents with files on disk: stale, then deleted by their mark, then purged with their files.

Start a worker, then run this file (``BROKER`` and ``BACKEND`` name other servers):

    celery -A examples.sweeps.documents worker --loglevel INFO
    python -m examples.sweeps.documents

``celery -A examples.sweeps.documents pgbarrier sweep --list`` shows the sweeps.
"""

import os
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from celery import Celery, chain
from celery.schedules import crontab
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_pgbarrier.sweeps import Expire, Purge, SoftDelete

app = Celery(
    "documents",
    broker=os.environ.get("BROKER", "redis://localhost:6379/0"),
    backend=os.environ.get("BACKEND", "pgbarrier://postgres@localhost:5432/postgres"),
)


class Base(DeclarativeBase):
    type_annotation_map = {datetime: sa.DateTime(timezone=True)}


class Document(Base):
    __tablename__ = "documents"

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    state: Mapped[str] = mapped_column(default="live")
    used_at: Mapped[datetime] = mapped_column(index=True)
    deleted_at: Mapped[datetime | None] = mapped_column(index=True)


def remove_file(document: Document) -> None:
    # It may run again for the same row after a crash: a file that is gone is as it should be.
    Path(document.path).unlink(missing_ok=True)


stale = Expire(
    "documents.stale",
    Document,
    where=lambda now: Document.used_at < now - timedelta(days=365),
    values={"state": "stale"},
    terminal={"state": ["deleted", "purging"]},
)
delete = SoftDelete(
    "documents.delete",
    Document,
    where=lambda now: (Document.state == "stale") & (Document.used_at < now - timedelta(days=400)),
    values={"state": "deleted", "deleted_at": sa.func.now()},
)
purge = Purge(
    "documents.purge",
    Document,
    where=lambda now: Document.deleted_at < now - timedelta(days=30),
    mark={"state": "purging"},
    before_delete=remove_file,
)

for sweep in (stale, delete, purge):
    sweep.register(app)


@app.task(name="documents.tidy", ignore_result=True)
def tidy() -> None:
    stages(app)


def stages(celery: Celery):
    """Send the three sweeps, each after the one before."""
    names = [sweep.task_name for sweep in (stale, delete, purge)]
    return chain(*(celery.signature(name, immutable=True) for name in names)).delay()


app.conf.beat_schedule = {"tidy": {"task": "documents.tidy", "schedule": crontab(hour=3, minute=0)}}


def fill(engine: sa.Engine, folder: Path) -> None:
    """Make 400 documents: in use, stale, long stale, and deleted more than a month ago."""
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    now = datetime.now().astimezone()
    with Session(engine) as session:
        for number in range(400):
            path = folder / f"{number}.txt"
            path.write_text("words")
            age = timedelta(days=(1, 380, 500, 500)[number % 4])
            gone = now - timedelta(days=40) if number % 4 == 3 else None
            document = Document(path=str(path), used_at=now - age, deleted_at=gone)
            document.state = "deleted" if gone else "live"
            session.add(document)
        session.commit()


if __name__ == "__main__":
    engine = app.backend.database.engine()
    folder = Path(tempfile.mkdtemp())
    fill(engine, folder)
    last = stages(app)
    last.get(timeout=60)
    for result in (last.parent.parent, last.parent, last):
        print({name: result.result[name] for name in ("batches", "rows", "failed", "left")})
    query = sa.text("SELECT state, count(*) FROM documents GROUP BY state ORDER BY state")
    with engine.connect() as connection:
        print("documents:", dict(map(tuple, connection.execute(query))))
    print("files left:", len(list(folder.iterdir())))
    Base.metadata.drop_all(engine)
