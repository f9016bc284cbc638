"""The chords of the campaign, and what is to become of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tests.chaos.tickets import Ticket

#: Points that the producer passes.
DISPATCH = ("dispatch.captured", "dispatch.committed", "dispatch.half-published")


@dataclass(frozen=True)
class Chord:
    """A chord of members 1, 2, ..., with the fault that it carries.

    :param seconds: how long a member takes.
    :param where: who carries the ticket: ``member`` (the last to end), ``body`` or ``dispatch``.
    :param ends: how its last member ends if not well: ``fail`` or ``die``.
    :param pause: seconds that the producer waits before the call.
    :param gate: a file that it waits for before.
    """

    label: str
    size: int
    seconds: float = 0.0
    ticket: Ticket | None = None
    where: str = ""
    ends: str = ""
    pause: float = 0.0
    gate: str = ""

    @property
    def total(self) -> int:
        """What its body sums up."""
        return self.size * (self.size + 1) // 2

    @property
    def expected(self) -> str:
        """``body``, ``errback``, or ``nothing`` where its producer dies before the commit."""
        if self.where == "dispatch" and self.ticket and self.ticket.victim == "producer":
            return "nothing" if self.ticket.point == "dispatch.captured" else "body"
        return "errback" if self.ends else "body"

    def encode(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def decode(cls, values: dict[str, Any]) -> Chord:
        ticket = values["ticket"]
        return cls(**{**values, "ticket": Ticket(**ticket) if ticket else None})

    def signature(self) -> Any:
        """The canvas, of the current application."""
        from celery import chord

        from tests.chaos.tasks import body, errback, member

        ticket = self.ticket.encode() if self.ticket else None
        header = [member.s(self.label, n, n, seconds=self.seconds) for n in range(1, self.size)]
        last = member.s(
            self.label,
            self.size,
            self.size,
            seconds=self.seconds,
            others=self.size - 1 if self.where == "member" else 0,
            ends=self.ends,
            ticket=ticket if self.where == "member" else None,
        )
        released = self.ticket is not None and self.ticket.point == "release.committed"
        carried = ticket if self.where == "body" or released else None
        callback = body.s(label=self.label, ticket=carried)
        callback.on_error(errback.s(label=self.label))
        return chord([*header, last], callback)
