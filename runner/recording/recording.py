"""A recording: which DeepGEMM calls a server made, when, and what they compiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import UserError
from runner.files import parse_json
from runner.kernels.call_template import Template, in_words
from runner.kernels.types import steps_of

VERSION = 1
_WALKERS = ("deep_gemm_wrapper/compile_utils.py", "warmup/deep_gemm_warmup.py")
"""Files of SGLang and vLLM that walk lists of M at start-up."""


@dataclass
class Seen:
    """Where a call was seen in one phase, over all ranks.

    Attributes:
        counts: how often it was made, by M; by 0 for a call without M.
        entries: names of the cache entries that it made.
        seconds: the longest first call.
    """

    counts: dict[int, int] = field(default_factory=dict)
    entries: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ms(self) -> list[int]:
        """M that were seen, ascending; none for a call without M."""
        return sorted(m for m in self.counts if m)

    @property
    def calls(self) -> int:
        """How often it was made."""
        return sum(self.counts.values())

    def add(self, other: Seen) -> None:
        """Add what was seen elsewhere."""
        for m, count in other.counts.items():
            self.counts[m] = self.counts.get(m, 0) + count
        self.entries += other.entries
        self.seconds = max(self.seconds, other.seconds)


@dataclass
class CallGroup:
    """Calls that differ in M alone.

    Attributes:
        call: the call, its sizes open where they follow M.
        reason: why it could not be opened, so that it holds for its own sizes only; else empty.
        by: source lines of the server that made it, the nearest first.
        phases: what was seen, by phase, in order of time.
        errors: what it raised.
    """

    call: Template
    num_sms: int | None
    reason: str
    by: list[str]
    ranks: set[int] = field(default_factory=set)
    phases: dict[str, Seen] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def ms(self) -> list[int]:
        """All M that were seen, ascending."""
        return sorted({m for seen in self.phases.values() for m in seen.ms})

    def add(self, group: CallGroup) -> None:
        """Add what another group of the same call has seen."""
        self.ranks |= group.ranks
        self.errors += [error for error in group.errors if error not in self.errors]
        for phase, seen in group.phases.items():
            self.phases.setdefault(phase, Seen()).add(seen)

    @property
    def walked(self) -> bool:
        """Whether a warm-up of the server made it, which walks lists of M."""
        return any(line.split(":")[0].endswith(_WALKERS) for line in self.by)

    @property
    def title(self) -> str:
        """The call as one line."""
        return in_words(self.call.function, self.call.args, self.call.kwargs)


@dataclass(frozen=True)
class Request:
    """A request to the server: prompt tokens, and start and end in seconds since the start."""

    tokens: int
    start: float
    end: float
    error: str = ""


@dataclass
class Recording:
    """A server's run.

    Attributes:
        server: its name and version; empty if it is no known server.
        gpu: the stand-in's GPU; empty on a real one.
        ready: seconds from the start until the server answered; None if it never did.
        max_tokens: most tokens of a forward, as the server says; None if it does not.
        peak_bytes: most memory that each process held, by pid.
        counts: bypasses and fallbacks, by ``kind name``.
        made: all entries that a rehearsal's cache got, whoever made them.
        problems: what went wrong with the recording itself.
    """

    command: list[str] = field(default_factory=list)
    server: str = ""
    gpu: str = ""
    library: str = ""
    ready: float | None = None
    max_tokens: int | None = None
    requests: list[Request] = field(default_factory=list)
    groups: list[CallGroup] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[int, int] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def most_rows(self) -> int:
        """Most tokens of a forward: as the server says, else the largest M of its own calls."""
        seen = [m for group in self.groups if not group.walked for m in group.ms]
        return self.max_tokens or max(seen, default=1)

    def entries(self, phases: Iterable[str] | None = None) -> list[str]:
        """Distinct cache entries that were made, in all phases or in some."""
        wanted = None if phases is None else set(phases)
        return sorted(
            {
                entry
                for group in self.groups
                for phase, seen in group.phases.items()
                if wanted is None or phase in wanted
                for entry in seen.entries
            }
        )


# -- JSON


def to_json(recording: Recording) -> dict[str, object]:
    """The recording as plain data; :func:`read_recording` is the inverse."""
    return {
        "version": VERSION,
        "kind": "recording",
        "command": recording.command,
        "server": recording.server,
        "gpu": recording.gpu,
        "library": recording.library,
        "ready": recording.ready,
        "max_tokens": recording.max_tokens,
        "requests": [vars(request) for request in recording.requests],
        "calls": [_group_json(group) for group in recording.groups],
        "counts": recording.counts,
        "peak_bytes": {str(pid): size for pid, size in recording.peak_bytes.items()},
        "made": recording.made,
        "problems": recording.problems,
    }


def _group_json(group: CallGroup) -> dict[str, object]:
    return {
        "function": group.call.function,
        "args": group.call.args,
        "kwargs": group.call.kwargs,
        "num_sms": group.num_sms,
        "reason": group.reason,
        "by": group.by,
        "ranks": sorted(group.ranks),
        "phases": {
            phase: {**vars(seen), "counts": _counts_json(seen.counts)}
            for phase, seen in group.phases.items()
        },
        "errors": group.errors,
    }


def _counts_json(counts: Mapping[int, int]) -> list[list[int]]:
    """[first M, last M, step, calls of each] for runs of M that were called equally often."""
    by_count: dict[int, list[int]] = {}
    for m in sorted(counts):
        by_count.setdefault(counts[m], []).append(m)
    return sorted([*run, n] for n, ms in by_count.items() for run in steps_of(ms))


def read_recording(path: Path) -> Recording:
    """Read the JSON of ``runner record`` and ``runner rehearse``.

    Raises:
        UserError: the file cannot be read, or is no recording of this version.
    """
    try:
        data = parse_json(path.read_bytes())
        if not isinstance(data, dict) or data.get("kind") != "recording":
            raise UserError(f"{path} is not a recording of runner record or runner rehearse")
        if data["version"] != VERSION:
            raise UserError(f"{path} has version {data['version']}: this tool reads {VERSION}")
        return Recording(
            command=data["command"],
            server=data["server"],
            gpu=data["gpu"],
            library=data["library"],
            ready=data["ready"],
            max_tokens=data["max_tokens"],
            requests=[Request(**each) for each in data["requests"]],
            groups=[_read_group(each) for each in data["calls"]],
            counts=data["counts"],
            peak_bytes={int(pid): size for pid, size in data["peak_bytes"].items()},
            made=data["made"],
            problems=data["problems"],
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a recording: {error!r}") from None


def _read_group(data: Mapping[str, Any]) -> CallGroup:
    return CallGroup(
        Template(data["function"], data["args"], data["kwargs"]),
        data["num_sms"],
        data["reason"],
        data["by"],
        set(data["ranks"]),
        {phase: _read_seen(seen) for phase, seen in data["phases"].items()},
        data["errors"],
    )


def _read_seen(data: Mapping[str, Any]) -> Seen:
    counts = {
        m: count
        for first, last, step, count in data["counts"]
        for m in range(first, last + 1, step)
    }
    return Seen(counts, data["entries"], data["seconds"])
