"""What became of the chords: the same count for every backend."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.chords import Chord
from tests.chaos.victims import Hit

EVENTS = """
SELECT task_id, event, label, kind, position, pid, grp,
       CAST(EXTRACT(epoch FROM at) AS float8) AS at
  FROM chaos_event ORDER BY at
"""
EFFECTS = "SELECT label, kind, position, value FROM chaos_effect ORDER BY at"


@dataclass
class Result:
    """The count of one scenario."""

    scenario: str
    backend: str
    seed: str
    chords: int = 0
    hits: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    effects: int = 0
    reruns: int = 0
    rows: int = 0
    #: Seconds until what was hit went on, and until its claim was put back (ours).
    recovery: list[float] = field(default_factory=list)
    put_back: list[float] = field(default_factory=list)
    seconds: float = 0.0
    details: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether every promise was kept."""
        counts = (self.lost, self.doubled, self.wrong, self.effects, self.reruns, self.rows)
        return not any(counts)


@dataclass
class Evidence:
    """What the checker looks at."""

    chords: Sequence[Chord]
    calls: Mapping[str, str]
    events: Sequence[Any]
    effects: Sequence[Any]
    hits: Sequence[Hit]
    ours: bool

    def __post_init__(self) -> None:
        self.starts: dict[str, list[Any]] = defaultdict(list)
        self.stored: dict[str, list[float]] = defaultdict(list)
        self.claims: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.values: dict[str, list[int]] = defaultdict(list)
        for event in self.events:
            if event.event == "start":
                self.starts[event.label].append(event)
            elif event.event == "stored":
                self.stored[event.task_id].append(event.at)
            elif event.event == "claimed":
                self.claims[event.task_id, event.pid].append(event.at)
        for row in self.effects:
            if row.kind == "body":
                self.values[row.label].append(int(row.value))

    def ids(self, label: str, kind: str) -> set[str]:
        """The tasks of a kind that a chord ran."""
        return {event.task_id for event in self.starts[label] if event.kind == kind}

    def outcomes(self, label: str, kind: str) -> int:
        """How many successes a chord's tasks of a kind have stored."""
        return sum(len(self.stored[task_id]) for task_id in self.ids(label, kind))

    def again(self, label: str, kind: str) -> list[str]:
        """Tasks of a kind that began after they had stored their success."""
        return [
            f"{label}: {kind} {event.position} began again after its success ({event.task_id})"
            for event in self.starts[label]
            if event.kind == kind and self._late(event)
        ]

    def _late(self, start: Any) -> bool:
        """Whether a run began after a success; a run that was stopped in its claim did before."""
        stored = self.stored[start.task_id]
        if not stored or start.at <= min(stored):
            return False
        # A claim that was made ahead is its parent's, with process id 0.
        own = self.claims[start.task_id, start.pid] + self.claims[start.task_id, 0]
        claims = [at for at in own if at < start.at]
        return not claims or max(claims) > min(stored)


def check(result: Result, seen: Evidence) -> None:
    """Count what went wrong, into ``result``."""
    result.chords, result.hits = len(seen.chords), len(seen.hits)
    for chord in seen.chords:
        _check_chord(result, seen, chord)
    applied = Counter((row.label, row.kind, row.position) for row in seen.effects)
    twice = [f"{key}: applied {count} times" for key, count in applied.items() if count > 1]
    result.effects += len(twice)
    result.details += twice
    result.recovery += recoveries(seen)
    result.put_back += put_back(seen)


def _check_chord(result: Result, seen: Evidence, chord: Chord) -> None:
    label = chord.label
    bodies, errbacks = seen.outcomes(label, "body"), seen.ids(label, "errback")
    again = seen.again(label, "body")
    if _must_end(seen, chord) and not bodies and not errbacks:
        result.lost += 1
        result.details.append(f"{label}: lost ({seen.calls.get(label, 'the call was cut off')})")
    if bodies > 1 or len(seen.ids(label, "body")) > 1 or len(errbacks) > 1 or again:
        result.doubled += 1
        result.details += [f"{label}: {bodies} bodies, {len(errbacks)} errbacks", *again]
    if problem := _wrong(seen, chord, bool(bodies), bool(errbacks)):
        result.wrong += 1
        result.details.append(f"{label}: {problem}")
    reruns = seen.again(label, "member")
    result.reruns += len(reruns)
    result.details += reruns


def _must_end(seen: Evidence, chord: Chord) -> bool:
    """Whether a body or an errback is due: the call returned, or something of the chord ran."""
    if chord.expected == "nothing":
        return False
    if seen.starts[chord.label] or seen.calls.get(chord.label) == "returned":
        return True
    cut_off = chord.label not in seen.calls
    return seen.ours and cut_off and chord.ticket is not None and chord.ticket.punched


def _wrong(seen: Evidence, chord: Chord, body: bool, errback: bool) -> str:
    began = bool(seen.starts[chord.label])
    values = set(seen.values[chord.label])
    if chord.expected == "nothing" and began:
        return "it runs, although its producer died before the call's end"
    if values - {chord.total}:
        return f"its body summed up {values}, not {chord.total}"
    if body and errback:
        return "body and errback ran"
    if body and chord.expected == "errback":
        return "its body ran although a member failed"
    if errback and chord.expected == "body":
        return "its errback ran although no member failed"
    return ""


def recoveries(seen: Evidence) -> list[float]:
    """How long what was hit stood still, seconds.

    Of a chord that was hit at a fault point: until the task that was to go on began. Of a process
    that was killed or stopped: until each task that it ran began again.
    """
    chords = {chord.label: chord for chord in seen.chords}
    found: list[float] = []
    for hit in seen.hits:
        if hit.label in chords:
            waiting = [_awaited(seen, chords[hit.label], hit)]
        else:
            waiting = [
                [e for e in seen.starts[run.label] if e.task_id == run.task_id]
                for run in _interrupted(seen, hit)
            ]
        for starts in waiting:
            after = [event.at for event in starts if event.at > hit.at]
            found += [min(after) - hit.at] if after else []
    return found


def _awaited(seen: Evidence, chord: Chord, hit: Hit) -> list[Any]:
    """The starts of the task with which a chord that was hit goes on."""
    assert chord.ticket is not None
    starts = seen.starts[chord.label]
    if chord.where == "dispatch":
        return starts
    if chord.where == "body":
        return [event for event in starts if event.kind == "body"]
    if chord.ticket.point not in ("finish.committed", "release.committed"):
        return [e for e in starts if e.kind == "member" and e.position == chord.size]
    before = [
        i for i in seen.ids(chord.label, "member") if min(seen.stored[i], default=1e99) < hit.at
    ]
    complete = len(before) == chord.size
    return [event for event in starts if event.kind == "body" and complete]


def _interrupted(seen: Evidence, hit: Hit) -> list[Any]:
    """The last starts of the processes that were hit, of tasks with no success by then."""
    last: dict[int, Any] = {}
    for event in seen.events:
        if event.event == "start" and event.at < hit.at and {event.pid, event.grp} & hit.pids:
            last[event.pid] = event
    return [e for e in last.values() if not any(at < hit.at for at in seen.stored[e.task_id])]


def put_back(seen: Evidence) -> list[float]:
    """How long after its process was hit each claim was put back, seconds."""
    group = {event.pid: event.grp for event in seen.events if event.event == "start"}
    found = []
    for event in seen.events:
        if event.event == "put back":
            holder = {event.pid, group.get(event.pid)}
            blows = [hit.at for hit in seen.hits if hit.at < event.at and holder & hit.pids]
            found += [event.at - max(blows)] if blows else []
    return found
