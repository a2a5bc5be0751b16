"""Plan the calls in a recording of ``runner record`` or ``runner rehearse``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click

from runner.config.environ import Environ
from runner.errors import UserError
from runner.files import write_json
from runner.kernels.table import by_shape
from runner.planning.call_demands import call_demands
from runner.planning.plan import Plan, make_plan, plan_to_json
from runner.recording.recording import Recording, read_recording
from runner.report.console import counted
from runner.report.progress import counting, progress
from runner.scenario import Scenario
from runner.standin.gpus import DEFAULT_GPU, gpu_named
from runner.target import CompilerOptions, LibraryOptions, Target, target_of


@dataclass(frozen=True)
class Planned:
    """The plan that the options ask for.

    Attributes:
        scenario: the scenario; None if single GEMMs or recorded calls are planned.
        title: one line that describes the plan.
        plan: the plan.
    """

    scenario: Scenario | None
    title: str
    plan: Plan


def library_of(recording: Recording, wanted: LibraryOptions) -> LibraryOptions:
    """The library and the GPU of a recording, where the options name no others.

    Raises:
        UserError: the library was recorded on another machine, or in another place.
    """
    if not wanted.library and recording.library and not Path(recording.library).is_dir():
        raise UserError(
            f"{recording.library}, the library of the recording, is not here: give one of the same "
            "version with --library"
        )
    return LibraryOptions(
        library=wanted.library or recording.library or None,
        gpu=wanted.gpu or recording.gpu or None,
    )


def plan_calls(recording: Recording, max_tokens: int, target: Target) -> Planned:
    """Plan every kernel that recorded calls can need with up to ``max_tokens`` tokens.

    Raises:
        UserError: the library refuses a call.
    """
    found = call_demands(recording, max_tokens=max_tokens, num_sms=target.gpu.num_sms)
    for note in found.notes:
        click.echo(note, err=True)
    demands = by_shape(found.demands)
    title = (
        f"{counted(len(recording.groups), 'recorded call')} of {' '.join(recording.command)}, "
        f"forwards of up to {max_tokens} tokens"
    )
    return Planned(None, title, make_plan(demands, target.source.table(lambda: demands)))


def write_plan_of_calls(
    path: Path, folder: Path, wanted: LibraryOptions, compiler: CompilerOptions | None = None
) -> Path:
    """Plan a recording's calls, and write what ``runner plan --calls --json`` writes.

    Returns:
        The plan's file in ``folder``.

    Raises:
        UserError: no recording, or the library or its compiler is not known here.
    """
    recording = read_recording(path)
    library = library_of(recording, wanted)
    gpu, environ = gpu_named(library.gpu or DEFAULT_GPU), Environ.read(os.environ)
    with progress("ask the library") as shown:
        target = target_of(
            library, gpu, environ, compiler=compiler, ask=True, progress=counting(shown)
        )
        result = plan_calls(recording, recording.most_rows, target)
    data = plan_to_json(result.plan, target.keys(result.plan.table))
    plan = folder / "plan.json"
    write_json(plan, {**data, "for": result.title, "policy": None})
    return plan
