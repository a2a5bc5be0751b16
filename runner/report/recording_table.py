"""Print a recording: what a server called in each phase, and what still compiled in traffic."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.table import Table

from runner.recording.recording import CallGroup, Recording
from runner.report.console import counted, make_console, make_table

_SHOWN_M = 6
START_PHASES = ("start", "load", "warm-up", "capture")


def print_recording(recording: Recording, file: TextIO | None = None) -> None:
    """Print phases, stalls after the server was ready, other JITs, and what is not general."""
    console = make_console(file=file)
    if recording.server:
        console.print(f"{recording.server}, {recording.library or 'no DeepGEMM'}")
    where = f"on a stand-in {recording.gpu}" if recording.gpu else "on the GPU here"
    if recording.ready is None and (recording.server or recording.gpu):
        console.print(f"the server never became ready ({where})")
    elif recording.ready is not None:
        console.print(f"ready after {recording.ready:.0f} s {where}")
    if recording.peak_bytes:
        most = max(recording.peak_bytes.values()) / 2**30
        console.print(
            f"memory of the largest of {len(recording.peak_bytes)} processes: {most:.1f} GiB"
        )
    console.print(_phase_table(recording))
    _print_stalls(recording, console)
    _print_counts(recording, console)
    for group in recording.groups:
        if group.reason:
            console.print(f"for its own sizes only: {group.title} ({group.reason})")
    for problem in recording.problems:
        console.print(problem)


def stalls_of(recording: Recording) -> list[tuple[str, CallGroup]]:
    """(phase, call) of what made cache entries after the server was ready."""
    return [
        (phase, group)
        for group in recording.groups
        for phase, seen in group.phases.items()
        if phase not in START_PHASES and seen.entries
    ]


def _phase_table(recording: Recording) -> Table:
    table = make_table("Calls of DeepGEMM", ["phase"], ["functions", "calls", "entries made"])
    phases = {phase for group in recording.groups for phase in group.phases}
    later = [f"request of {request.tokens} tokens" for request in recording.requests]
    order = [*START_PHASES, "ready", *dict.fromkeys(later)]
    for phase in (each for each in order if each in phases):
        groups = [group for group in recording.groups if phase in group.phases]
        calls = sum(group.phases[phase].calls for group in groups)
        entries = recording.entries([phase])
        table.add_row(phase, str(len(groups)), str(calls), str(len(entries)))
    return table


def _print_stalls(recording: Recording, console: Console) -> None:
    found = stalls_of(recording)
    if not found:
        if recording.requests:
            console.print("no request compiled anything after the server was ready")
        return
    table = make_table("Compiled after it was ready", ["by", "call"], ["M", "entries"])
    for phase, group in found:
        seen = group.phases[phase]
        ms = ", ".join(map(str, seen.ms[:_SHOWN_M])) or "-"
        table.add_row(phase, group.title, ms, str(len(seen.entries)))
    console.print(table)


def _print_counts(recording: Recording, console: Console) -> None:
    for kind, title in (
        ("bypass", "bypassed"),
        ("fallback", "fell back, as it logged"),
        ("not hooked", "not hooked, so it ran as it is"),
    ):
        times = _times(recording, kind)
        if times:
            console.print(f"{title}:")
        for name, count in times.items():
            console.print(f"  {name} ({counted(count, 'time')})")


def _times(recording: Recording, kind: str) -> dict[str, int]:
    """How often each thing of a kind happened; a bypassed module counts for all its functions."""
    found: dict[str, int] = {}
    for key, count in recording.counts.items():
        if key.startswith(f"{kind} "):
            name = key.removeprefix(f"{kind} ")
            name = name.partition(".")[0] if kind == "bypass" else name
            found[name] = found.get(name, 0) + count
    return found
