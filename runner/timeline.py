"""The Timeline: what each rank did when. Real and simulated runs give the same type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from runner.errors import UserError
from runner.files import parse_json, write_json

FIRST_REQUEST = "first request"
"""Phase whose end means that the server is up."""

KINDS = ("compile", "load", "compute", "comm", "wait", "setup", "phase", "beside")
"""Kinds of span.

``setup`` comes before a warm-up. ``phase`` spans enclose others, and ``beside`` spans are what a
communication stream does while the rank does something else; totals leave both kinds out.
"""

_JOIN_GAP = 1e-3
"""Largest gap in seconds across which two spans are still joined."""


class Span(NamedTuple):
    """One stretch of time on one rank.

    Attributes:
        rank: world rank.
        start: seconds since the run's origin.
        end: seconds since the run's origin.
        kind: one of :data:`KINDS`.
        name: a kernel's name, an operation, or a phase.
        key: for a compile, the kernel's identity, or empty if a builder works on several kernels
            at once; for comm, the operation's identity, equal on all ranks that take part;
            otherwise empty.

    The first use of a kernel that is neither in memory nor on disk is a ``compile`` span and then a
    ``load`` span. A load alone is a hit on disk; a hit in memory leaves no span.
    """

    rank: int
    start: float
    end: float
    kind: str
    name: str
    key: str = ""

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def is_kernel(self) -> bool:
        """Whether this is the compile of a single kernel."""
        return self.kind == "compile" and bool(self.key)


@dataclass(frozen=True)
class RankTotals:
    """Seconds of one rank by kind; ``total`` runs from the origin to the rank's last span."""

    rank: int
    compile: float
    load: float
    compute: float
    comm: float
    wait: float
    setup: float
    total: float
    kernels_compiled: int


@dataclass(frozen=True)
class Timeline:
    """Spans of all ranks of one run of one warm-up policy.

    Attributes:
        policy: name of the warm-up policy.
        source: ``measured`` or ``predicted``.
        world_size: number of ranks.
        spans: ordered by (rank, start).
        meta: model, layout, machine and versions of the run, for reports and provenance.
    """

    policy: str
    source: str
    world_size: int
    spans: tuple[Span, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The run's name in reports."""
        return f"{self.policy} ({self.source})"

    @cached_property
    def wall(self) -> float:
        """Seconds from the origin to the last span's end."""
        return max((span.end for span in self.spans), default=0.0)

    def end_of(self, phase: str) -> float | None:
        """When the last rank leaves a phase, in seconds since the origin; None if none has it."""
        ends = [s.end for s in self.spans if s.kind == "phase" and s.name == phase]
        return max(ends, default=None)

    @cached_property
    def up(self) -> float:
        """When the first request was answered, in seconds since the origin; else the wall."""
        end = self.end_of(FIRST_REQUEST)
        return self.wall if end is None else end

    @cached_property
    def compiles(self) -> list[Span]:
        """Compile spans, including those for several kernels at once."""
        return [span for span in self.spans if span.kind == "compile"]

    @property
    def kernels_compiled(self) -> int:
        """Number of compiles; a kernel compiled on two ranks or nodes counts twice."""
        return sum(span.is_kernel for span in self.compiles)

    @property
    def distinct_kernels(self) -> int:
        """Number of different kernels that were compiled."""
        return len({span.key for span in self.compiles if span.is_kernel})

    @property
    def duplicates(self) -> int:
        """Compiles of a kernel beyond its first."""
        return self.kernels_compiled - self.distinct_kernels

    @property
    def compile_seconds(self) -> float:
        """Sum of all compiles' durations."""
        return sum(span.seconds for span in self.compiles)

    def by_rank(self) -> list[list[Span]]:
        """Each rank's spans, ordered by start."""
        ranks: list[list[Span]] = [[] for _ in range(self.world_size)]
        for span in self.spans:
            ranks[span.rank].append(span)
        return ranks

    def phases(self) -> dict[str, float]:
        """Each phase's longest duration over the ranks, in order of first appearance."""
        longest: dict[str, float] = {}
        for span in sorted(self.spans, key=lambda span: (span.start, span.end)):
            if span.kind == "phase":
                longest[span.name] = max(longest.get(span.name, 0.0), span.seconds)
        return longest

    def totals(self) -> list[RankTotals]:
        """Totals of every rank."""
        found = []
        for rank, spans in enumerate(self.by_rank()):
            seconds = dict.fromkeys(("compile", "load", "compute", "comm", "wait", "setup"), 0.0)
            for span in spans:
                if span.kind in seconds:
                    seconds[span.kind] += span.seconds
            total = max((span.end for span in spans), default=0.0)
            compiled = sum(span.is_kernel for span in spans)
            found.append(RankTotals(rank, **seconds, total=total, kernels_compiled=compiled))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data; times rounded to microseconds."""
        return {
            "version": 1,
            "policy": self.policy,
            "source": self.source,
            "world_size": self.world_size,
            "meta": self.meta,
            "spans": [
                [s.rank, round(s.start, 6), round(s.end, 6), s.kind, s.name, s.key]
                for s in self.spans
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timeline:
        """Rebuild a Timeline from :meth:`to_json`'s data.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: not such data.
        """
        if data["version"] != 1:
            raise ValueError(f"its version {data['version']!r} is not 1")
        timeline = cls(
            policy=str(data["policy"]),
            source=str(data["source"]),
            world_size=int(data["world_size"]),
            spans=tuple(
                Span(int(rank), float(start), float(end), kind, name, key)
                for rank, start, end, kind, name, key in data["spans"]
            ),
            meta=dict(data["meta"]),
        )
        if timeline.world_size < 1:
            raise ValueError(f"its world_size {timeline.world_size} is not at least 1")
        for span in timeline.spans:
            exists = 0 <= span.rank < timeline.world_size and span.kind in KINDS
            in_order = isfinite(span.start) and isfinite(span.end) and span.start <= span.end
            named = isinstance(span.name, str) and isinstance(span.key, str)
            if not (exists and in_order and named):
                raise ValueError(f"no such span in {timeline.world_size} ranks: {span}")
        return timeline


def merge(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sort the raw spans of all ranks, cut waits out of communication, and join neighbours.

    A collective or receive is one comm span per rank, with the same key on every rank that takes
    part. Each rank waits until the last one has arrived; the rest is communication. A send does
    not wait for its receiver. Adjacent compute (or comm) spans of a rank become one.
    """
    ordered = sorted(spans, key=lambda span: (span.rank, span.start, -span.end))
    last_arrival: dict[str, float] = {}
    for span in ordered:
        if span.kind == "comm" and span.key:
            last_arrival[span.key] = max(last_arrival.get(span.key, 0.0), span.start)
    merged: list[Span] = []
    for span in ordered:
        if span.kind != "comm" or span.name.startswith("send "):
            _append(merged, span)
            continue
        arrival = min(last_arrival.get(span.key, 0.0), span.end)
        if arrival > span.start:
            merged.append(Span(span.rank, span.start, arrival, "wait", span.name, span.key))
        if arrival < span.end:
            start = max(span.start, arrival)
            _append(merged, Span(span.rank, start, span.end, "comm", span.name, span.key))
    return tuple(merged)


def _append(merged: list[Span], span: Span) -> None:
    """Append a span, or extend the last one with it."""
    if merged and span.kind in ("compute", "comm"):
        last = merged[-1]
        alike = (last.rank, last.kind) == (span.rank, span.kind)
        if alike and span.start - last.end < _JOIN_GAP:
            end = max(last.end, span.end)
            merged[-1] = Span(last.rank, last.start, end, last.kind, span.kind)
            return
    merged.append(span)


def write_timelines(path: Path, timelines: Sequence[Timeline]) -> None:
    """Write one or more Timelines to a JSON file (``-`` is standard output)."""
    write_json(path, {"timelines": [timeline.to_json() for timeline in timelines]})


def read_timelines(path: Path | str) -> list[Timeline]:
    """Read a file that :func:`write_timelines` wrote.

    Raises:
        UserError: the file is unreadable, not JSON, or not a Timeline file.
    """
    try:
        data = parse_json(Path(path).read_text())
        return [Timeline.from_json(item) for item in data["timelines"]]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is not a Timeline file: {error!r}") from None
