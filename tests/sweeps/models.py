"""The user's tables of these tests: mapped classes and Core tables with all kinds of keys."""

from __future__ import annotations

import uuid
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    type_annotation_map = {datetime: sa.DateTime(timezone=True)}


class Document(Base):
    __tablename__ = "documents"

    id: Mapped[int] = mapped_column(primary_key=True)
    deleted_at: Mapped[datetime | None]
    # The attribute's name is not the column's, as in many applications.
    status: Mapped[str] = mapped_column("state", default="live", server_default="live")
    path: Mapped[str | None]
    pages: Mapped[list[Page]] = relationship(order_by="Page.id")


class Page(Base):
    __tablename__ = "pages"

    id: Mapped[int] = mapped_column(primary_key=True)
    document_id: Mapped[int] = mapped_column(sa.ForeignKey("documents.id"))


class Job(Base):
    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(default="queued", server_default="queued")
    attempts: Mapped[int] = mapped_column(default=0, server_default="0")
    lease_until: Mapped[datetime | None]
    published_at: Mapped[datetime | None]


class Animal(Base):
    __tablename__ = "animals"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]


class Cat(Animal):
    __mapper_args__ = {"polymorphic_identity": "cat"}


class Whale(Animal):
    __tablename__ = "whales"
    __mapper_args__ = {"polymorphic_identity": "whale"}

    id: Mapped[int] = mapped_column(sa.ForeignKey("animals.id"), primary_key=True)


class Batch(Base):
    __tablename__ = "batches"

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(default="open")
    made_at: Mapped[datetime] = mapped_column(server_default=sa.func.now())


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    batch_id: Mapped[int] = mapped_column(sa.ForeignKey("batches.id"))
    number: Mapped[int] = mapped_column(sa.CheckConstraint("number > 0"))


objects = sa.Table(
    "objects",
    Base.metadata,
    sa.Column("id", sa.Uuid, primary_key=True, default=uuid.uuid4),
    sa.Column("status", sa.Text, nullable=False, server_default="active"),
    sa.Column("number", sa.Integer, nullable=False),
    sa.CheckConstraint("status <> 'stale' OR number <> 13", name="unlucky"),
)

readings = sa.Table(
    "readings",
    Base.metadata,
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("at", sa.Integer, primary_key=True),
    sa.Column("value", sa.Integer),
)

keyless = sa.Table("keyless", Base.metadata, sa.Column("number", sa.Integer))


def fill_documents(engine: sa.Engine, count: int) -> None:
    """Make documents 1 to *count*, deleted forty days ago."""
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO documents (id, deleted_at) "
                "SELECT n, now() - interval '40 days' FROM generate_series(1, :count) AS n"
            ),
            {"count": count},
        )


def ids(engine: sa.Engine, condition: sa.ColumnElement[bool] | None = None) -> set[int]:
    """Return the ids of the documents that there are."""
    query = sa.select(Document.id)
    with engine.connect() as connection:
        return set(connection.scalars(query if condition is None else query.where(condition)))
