"""Jobs of two stages in the user's own table, and five ways in which they get stuck.

Each of five jobs is stuck in another way, because a process is really killed at that point; one
sweep finds and revives them all.  Start a worker, then run this file (``BROKER`` and ``BACKEND``
name other servers):

    celery -A examples.sweeps.jobs worker --loglevel INFO --concurrency 2
    python -m examples.sweeps.jobs
"""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_pgbarrier.sweeps import Claim, Revive, Rule

app = Celery(
    "jobs",
    broker=os.environ.get("BROKER", "redis://localhost:6379/0"),
    backend=os.environ.get("BACKEND", "pgbarrier://postgres@localhost:5432/postgres"),
)

LEASE = 6.0  # seconds that a stage may take; minutes, in earnest
GRACE = timedelta(seconds=3)  # that a process has to publish what it recorded
LOST = timedelta(minutes=15)  # after which a published message is taken for lost


class Base(DeclarativeBase):
    type_annotation_map = {datetime: sa.DateTime(timezone=True)}


class Job(Base):
    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(default="queued")
    stage: Mapped[str] = mapped_column(default="extract")
    attempts: Mapped[int] = mapped_column(default=0)
    changed_at: Mapped[datetime] = mapped_column(server_default=sa.func.clock_timestamp())
    published_at: Mapped[datetime | None]
    lease_until: Mapped[datetime | None]
    retry_at: Mapped[datetime | None]
    completions: Mapped[int] = mapped_column(default=0)
    dies_at: Mapped[str | None]  # for this demonstration: where its process is killed


claim = Claim(
    Job,
    state=Job.state,
    free=["queued", "retry"],
    running="running",
    lease=Job.lease_until,
    seconds=LEASE,
    attempts=Job.attempts,
    limit=5,
    gave_up="failed",
)


def unpublished(stage: str):
    """Recorded, and its process died before it published the message; or the message was lost."""

    def where(now: datetime) -> sa.ColumnElement[bool]:
        never = Job.published_at.is_(None) & (Job.changed_at < now - GRACE)
        lost = Job.published_at < now - LOST
        return (Job.state == "queued") & (Job.stage == stage) & (never | lost)

    return where


def lease_over(stage: str):
    """Its worker died."""
    return lambda now: (
        (Job.state == "running") & (Job.stage == stage) & (Job.lease_until < now)
    )  # fmt: skip


def task_args(job: Job) -> tuple[int]:
    return (job.id,)


again = {"state": "queued", "published_at": sa.func.now()}
# A claim counts an attempt; a message that was lost before any claim is counted here.
lost_attempt = {**again, "attempts": Job.attempts + 1}

revive = Revive(
    "jobs",
    Job,
    rules=[
        Rule("never published", unpublished("extract"), lost_attempt, "jobs.extract", task_args),
        Rule("worker died", lease_over("extract"), again, "jobs.extract", task_args),
        Rule(
            "retry lost",
            lambda now: (Job.state == "retry") & (Job.retry_at < now - GRACE),
            again,
            "jobs.extract",
            task_args,
        ),
        Rule("next stage lost", unpublished("load"), lost_attempt, "jobs.load", task_args),
        Rule("next stage's worker died", lease_over("load"), again, "jobs.load", task_args),
    ],
)
revive.register(app)
app.conf.beat_schedule = revive.beat_entry(30.0)


def die(job_id: int, point: str) -> None:
    """Kill this process, once, if this job is to demonstrate that."""
    chosen = sa.update(Job).where(Job.id == job_id, Job.dies_at == point).values(dies_at=None)
    with Session(app.backend.database.engine()) as session:
        killed = session.execute(chosen.returning(Job.id)).first()
        session.commit()
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)


def publish(session: Session, job_id: int, task: str) -> None:
    app.send_task(task, args=(job_id,))
    session.execute(
        sa.update(Job).where(Job.id == job_id).values(published_at=sa.func.clock_timestamp())
    )
    session.commit()


def submit(dies_at: str) -> None:
    with Session(app.backend.database.engine()) as session:
        job = Job(dies_at=dies_at)
        session.add(job)
        session.commit()
        die(job.id, "submitted")
        publish(session, job.id, "jobs.extract")


@app.task(name="jobs.extract")
def extract(job_id: int) -> None:
    with Session(app.backend.database.engine()) as session:
        claimed = claim.take(session, job_id)
        session.commit()
        if not claimed:
            return
        die(job_id, "extracting")
        if claimed.row.dies_at == "retrying":
            due = datetime.now().astimezone() + timedelta(seconds=1)
            claim.finish(session, claimed, "retry", {"retry_at": due})
            session.commit()
            die(job_id, "retrying")
            extract.apply_async((job_id,), eta=due)
            return
        following = {
            "stage": "load",
            "attempts": Job.attempts - 1,  # the claim of the next stage goes on with this try
            "published_at": None,
            "changed_at": sa.func.clock_timestamp(),
        }
        if not claim.finish(session, claimed, "queued", following):
            return  # another worker has taken over: nothing of this run counts
        session.commit()
        die(job_id, "extracted")
        publish(session, job_id, "jobs.load")


@app.task(name="jobs.load")
def load(job_id: int) -> None:
    with Session(app.backend.database.engine()) as session:
        claimed = claim.take(session, job_id)
        session.commit()
        if not claimed:
            return
        die(job_id, "loading")
        if claim.finish(session, claimed, "done", {"completions": Job.completions + 1}):
            session.commit()


def finished(engine: sa.Engine) -> bool:
    with Session(engine) as session:
        return not session.scalar(sa.select(sa.func.count()).where(Job.state != "done"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        submit(sys.argv[1])
        sys.exit()
    engine = app.backend.database.engine()
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    for point in ("submitted", "extracting", "retrying", "extracted", "loading"):
        subprocess.run([sys.executable, "-m", "examples.sweeps.jobs", point], check=False)
    revived: dict[str, int] = {}
    while not finished(engine):
        for rule, rows in revive.run().rules.items():
            revived[rule] = revived.get(rule, 0) + rows
        time.sleep(0.5)
    print("revived:", revived)
    with Session(engine) as session:
        for job in session.scalars(sa.select(Job).order_by(Job.id)):
            print(f"job {job.id}: {job.state}, {job.attempts} attempts, "
                  f"completed {job.completions} time(s)")  # fmt: skip
    Base.metadata.drop_all(engine)
