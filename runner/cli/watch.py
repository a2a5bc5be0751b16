"""``runner watch``: run any server unchanged and report every DeepGEMM compile."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import click

from runner.cache.plan_file import PlanFile, read_plan_file, uses_in_words
from runner.cli.calls import write_plan_of_calls
from runner.config.environ import Environ
from runner.errors import UserError, WorkFailedError
from runner.files import write_json
from runner.kernels.describe import config_of_source, in_words
from runner.kernels.nvcc import find_nvcc
from runner.report.outputs import check_outputs
from runner.target import LibraryOptions
from runner.watch.command import Watched
from runner.watch.command import watch as run_watched
from runner.watch.shim import FORBIDDEN_EXIT, CompileRecord

_PROGRAM_LENGTH = 40
_SHOWN_PROCESSES = 8


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--forbid-after",
    metavar="SECONDS|FILE",
    help="Fail compiles after this many seconds, or once FILE exists; the exit code is then 1.",
)
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON from runner plan, to show which M a compiled kernel serves.",
)
@click.option(
    "--calls",
    "calls_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The same from a recording of runner record or rehearse.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the compiles as JSON.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def watch(
    command: tuple[str, ...],
    forbid_after: str | None,
    plan_path: Path | None,
    calls_path: Path | None,
    json_path: Path | None,
) -> None:
    """Run COMMAND unchanged and report each DeepGEMM compile: its start, process and duration."""
    if str(json_path) == "-":
        raise UserError("--json needs a file: standard output belongs to the command")
    check_outputs(others=(json_path,))
    forbid = _seconds_or_file(forbid_after)
    plan = _plan(plan_path, calls_path)
    environ = Environ.read(os.environ)
    if environ.use_nvrtc or environ.dg_jit_use_nvrtc:
        name = "SGLANG_DG_USE_NVRTC" if environ.use_nvrtc else "DG_JIT_USE_NVRTC"
        raise UserError(f"{name} is set: compiles inside the process cannot be seen; unset it")
    nvcc = find_nvcc(environ)
    if nvcc is None:
        raise UserError("there is no nvcc to record: install one or set CUDA_HOME")
    with tempfile.TemporaryDirectory(prefix="deepgemm-watch-") as folder:
        watched = run_watched(
            command,
            nvcc=nvcc,
            environment=os.environ,
            work_dir=Path(folder),
            forbid_after=forbid,
            on_compile=lambda record, seconds: _report(_line(record, seconds, plan)),
        )
    _report(_summary(watched))
    if json_path is not None:
        write_json(json_path, _as_json(watched, command, plan), indent=1)
    _check(watched, forbid_after)


def _plan(plan_path: Path | None, calls_path: Path | None) -> PlanFile | None:
    if plan_path is not None and calls_path is not None:
        raise UserError("--plan and --calls both name a plan: give one")
    if calls_path is None:
        return read_plan_file(plan_path) if plan_path else None
    with tempfile.TemporaryDirectory(prefix="deepgemm-watch-") as folder:
        return read_plan_file(write_plan_of_calls(calls_path, Path(folder), LibraryOptions()))


def _check(watched: Watched, forbid_after: str | None) -> None:
    """Raise WorkFailedError if a compile or the command failed, or if nothing is proved."""
    if watched.forbidden:
        raise WorkFailedError(
            f"{len(watched.forbidden)} compiles after they were forbidden; the command ended with "
            f"{watched.exit_code}"
        )
    if watched.exit_code:
        raise WorkFailedError(f"the command ended with {watched.exit_code}", watched.exit_code)
    if forbid_after is not None and not watched.was_forbidding:
        raise WorkFailedError(
            f"--forbid-after {forbid_after}: the command ended before that, "
            "so nothing was forbidden"
        )


def _seconds_or_file(text: str | None) -> float | Path | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        return _coming_file(text)
    if not (isfinite(seconds) and seconds >= 0):
        raise UserError(f"--forbid-after {text} must be at least 0 seconds, or a file")
    return seconds


def _coming_file(text: str) -> Path:
    path = Path(text).absolute()
    if not text:
        raise UserError("--forbid-after '' must be at least 0 seconds, or a file")
    if not path.parent.is_dir():
        raise UserError(f"--forbid-after {text}: its folder does not exist; create it first")
    if path.exists():
        raise UserError(f"--forbid-after {text} exists already: remove it, or give 0 seconds")
    return path


def _report(line: str) -> None:
    print(f"[runner watch] {line}", file=sys.stderr, flush=True)


def _line(record: CompileRecord, seconds: float, plan: PlanFile | None) -> str:
    config = config_of_source(record.source)
    outcome = f"{record.end - record.start:.1f} s"
    if record.exit_code == FORBIDDEN_EXIT:
        outcome = "FORBIDDEN"
    elif record.exit_code:
        outcome += f", failed with {record.exit_code}"
    if plan is not None:
        uses = plan.uses_of(record.kernel_name, config)
        outcome += f"; {uses_in_words(uses) if uses else 'not in the plan'}"
    kernel = f"{record.kernel_name} ({in_words(config)})"
    return f"{seconds:8.1f} s  {_who(record)}  {kernel}  {outcome}"


def _who(record: CompileRecord) -> str:
    rank = f"rank {record.rank}, " if record.rank >= 0 else ""
    program = Path(record.command.split(" ")[0]).name[:_PROGRAM_LENGTH] or "?"
    return f"{rank}pid {record.pid} ({program})"


def _summary(watched: Watched) -> str:
    distinct = len({record.source for record in watched.compiled})
    total = sum(record.end - record.start for record in watched.compiled)
    words = [
        f"{len(watched.compiled)} compiles of {distinct} kernels, {total:.1f} s of compiling in "
        f"{watched.seconds:.1f} s"
    ]
    if watched.unfinished:
        words.append(f"{len(watched.unfinished)} never ended")
    if watched.forbidden:
        words.append(f"{len(watched.forbidden)} forbidden")
    processes = Counter(map(_who, watched.records)).most_common(_SHOWN_PROCESSES)
    if processes:
        words.append("; ".join(f"{who}: {count}" for who, count in processes))
    return ", ".join(words)


def _as_json(watched: Watched, command: Sequence[str], plan: PlanFile | None) -> dict[str, object]:
    compiles = []
    for record in [*watched.records, *watched.unfinished]:
        config = config_of_source(record.source)
        finished = record.end > 0
        compiles.append(
            {
                "start": round(record.start - watched.started, 3),
                "seconds": round(record.end - record.start, 3) if finished else None,
                "exit_code": record.exit_code if finished else None,
                "forbidden": record.exit_code == FORBIDDEN_EXIT,
                "rank": record.rank,
                "pid": record.pid,
                "command": record.command,
                "name": record.kernel_name,
                "config": config,
                "uses": plan.uses_of(record.kernel_name, config) if plan else None,
            }
        )
    return {
        "version": 1,
        "command": list(command),
        "exit_code": watched.exit_code,
        "seconds": round(watched.seconds, 3),
        "compiles": compiles,
    }
