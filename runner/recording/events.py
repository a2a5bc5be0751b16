"""Read what the hook wrote in a server's processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class RecordedCall:
    """A distinct call in one phase of one process.

    Attributes:
        args: positional arguments as plain data; see ``hook/describe.py``.
        num_sms: SMs that the library was told to use; None if it was told none.
        by: the server's source lines, ``file:line:function``, the nearest first.
        started: start of the first such call, in seconds since the epoch.
        seconds: how long the first one took, with any compile.
        entries: names of cache entries that it made.
    """

    function: str
    args: list[Any]
    kwargs: dict[str, Any]
    num_sms: int | None
    phase: str
    rank: int | None
    by: list[str]
    started: float
    seconds: float
    entries: list[str]
    error: str | None
    count: int = 1


@dataclass
class ProcessRecord:
    """What one process of the server did.

    Attributes:
        libraries: the DeepGEMM modules that it imported, as (name, file).
        counts: bypasses and fallbacks, and how often each happened, by kind and name.
        stopped: why recording stopped in it; empty if it did not.
    """

    pid: int = 0
    argv: list[str] = field(default_factory=list)
    libraries: list[tuple[str, str]] = field(default_factory=list)
    calls: list[RecordedCall] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    stopped: str = ""


def read_processes(folder: Path) -> list[ProcessRecord]:
    """All processes that recorded anything, in the order of their first events."""
    return [_read_process(path) for path in sorted(folder.glob("*.jsonl"), key=_start_of)]


def _start_of(path: Path) -> int:
    return int(path.stem.partition("-")[2], 16)


def _read_process(path: Path) -> ProcessRecord:
    found = ProcessRecord()
    by_number: dict[int, RecordedCall] = {}  # Threads may write their calls in another order.
    for event in _events(path):
        kind = event.pop("event")
        if kind == "process":
            found.pid, found.argv = event["pid"], event["argv"]
        elif kind == "library":
            found.libraries.append((event["module"], event["file"]))
        elif kind == "call":
            names = RecordedCall.__dataclass_fields__
            call = RecordedCall(**{k: v for k, v in event.items() if k in names})
            by_number[event["number"]] = call
            found.calls.append(call)
        elif kind == "calls":
            for number, count in event["counts"]:
                by_number[number].count = count
        elif kind == "counts":
            found.counts |= event["counts"]
        elif kind == "stopped":
            found.stopped = event["error"]
        else:
            found.counts.setdefault(f"{kind} {event['name']}", event["count"])
    return found


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file; a killed process may have left half a line at its end."""
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
