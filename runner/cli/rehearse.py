"""``runner rehearse``: start a server on a stand-in GPU, and see what it calls."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from runner import api
from runner.cli.calls import plan_calls
from runner.cli.standin import GPU_OPTION, interpreter_of, version_text_of
from runner.config.environ import Environ, cache_folder
from runner.config.fields import OptionDetails, option
from runner.errors import UserError, WorkFailedError
from runner.files import write_json
from runner.kernels.nvcc import find_nvcc
from runner.options import with_options
from runner.recording.recording import Recording, to_json
from runner.recording.rehearsal import Rehearsal, rehearse_once
from runner.recording.server import KINDS, Server, kind_of
from runner.report.outputs import check_outputs
from runner.report.progress import counting, progress
from runner.report.recording_table import print_recording
from runner.standin.build import MOST_DEVICES
from runner.standin.gpus import gpu_named
from runner.target import LibraryOptions, target_of


@dataclass(frozen=True, kw_only=True)
class RehearseOptions:
    """What to rehearse on, and what to ask."""

    devices: int = option(
        8, OptionDetails("GPUs of the machine that is stood in for.", metavar="N", least=1)
    )
    request_tokens: tuple[int, ...] = option(
        (1, 300, 4000), OptionDetails("Prompt lengths to ask for once it is ready.")
    )
    cache_dir: Path | None = option(
        None,
        OptionDetails(
            "Kernel cache that the server finds, or --fix fills.  [default: an empty one]"
        ),
    )
    fix: bool = option(
        False,
        OptionDetails(
            "Build what the rehearsal calls, then rehearse again with other prompt lengths: it "
            "must compile nothing."
        ),
    )
    max_tokens: int | None = option(
        None,
        OptionDetails(
            "Most tokens of a forward, for --fix.  [default: as the server says]", metavar="N"
        ),
    )
    ready_timeout: float = option(
        900.0, OptionDetails("Longest wait until the server is ready.", unit="SECONDS")
    )
    request_timeout: float = option(
        120.0, OptionDetails("Longest wait for the answer to a request.", unit="SECONDS")
    )
    json: Path | None = option(
        None, OptionDetails("Write the (first) recording as JSON (- for stdout).")
    )


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@GPU_OPTION
@with_options(RehearseOptions)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def rehearse(options: RehearseOptions, command: tuple[str, ...], gpu: str) -> None:
    """Start a server on stand-in GPUs, ask it, and report every DeepGEMM call that it made.

    COMMAND is the server's own, run in its own environment; options for random weights and for
    no tokenizer are added to it. Nothing is computed, so answers mean nothing.
    """
    check_outputs(timeline=None, trace=None, plot=None, others=(options.json,))
    kind = kind_of(command)
    if kind is None:
        known = ", ".join(each.name for each in KINDS)
        raise UserError(f"{command[0]} is no server that can be rehearsed: give one of {known}")
    if options.devices > MOST_DEVICES:
        raise UserError(f"--devices {options.devices} must lie in 1..{MOST_DEVICES}")
    if options.fix and options.cache_dir is None:
        raise UserError("--fix builds a cache: say where with --cache-dir DIR")
    run = partial(_run, options, Server(kind, command), _with_dummy(command, kind.dummy), gpu)
    recording = run(options.request_tokens, None if options.fix else options.cache_dir)
    if options.json is not None:
        write_json(options.json, to_json(recording))
    if str(options.json) != "-":
        print_recording(recording)
    _check_ran(recording)
    if not options.fix:
        return
    if not recording.groups:
        raise WorkFailedError("no DeepGEMM call was recorded: there is nothing to build")
    assert options.cache_dir is not None
    kernels = _build(recording, options.max_tokens or recording.most_rows, options.cache_dir)
    again = run(tuple(map(_other_length, options.request_tokens)), options.cache_dir)
    if options.json is not None:
        after = {"kernels": kernels, "ready": again.ready, "entries": again.made}
        write_json(options.json, {**to_json(recording), "after_fix": after})
    print_recording(again, sys.stderr)
    _check_ran(again)
    if again.made:
        raise WorkFailedError(f"{len(again.made)} kernels were compiled in spite of the cache")
    _say(f"{options.cache_dir}: the server started and answered without a DeepGEMM compile")


def _run(
    options: RehearseOptions,
    server: Server,
    command: tuple[str, ...],
    gpu: str,
    request_tokens: tuple[int, ...],
    cache: Path | None,
) -> Recording:
    nvcc = find_nvcc(Environ.read(os.environ))
    with tempfile.TemporaryDirectory(prefix="deepgemm-rehearsal-") as folder:
        rehearsal = Rehearsal(
            command=command,
            gpu=gpu_named(gpu),
            devices=options.devices,
            python=interpreter_of(command),
            nvcc=nvcc,
            version_text=version_text_of(nvcc),
            folder=Path(folder),
            home=cache_folder(os.environ) / "rehearsal",
            cache=cache,
            request_tokens=request_tokens,
            ready_timeout=options.ready_timeout,
            request_timeout=options.request_timeout,
        )
        recording, stacks = rehearse_once(rehearsal, server, os.environ, _say)
    if stacks:
        print(stacks, file=sys.stderr)
    return recording


def _check_ran(recording: Recording) -> None:
    """Raise WorkFailedError if the server did not start or did not answer."""
    if recording.ready is None:
        raise WorkFailedError("the server never became ready")
    failed = [request for request in recording.requests if request.error]
    if failed:
        raise WorkFailedError(f"{len(failed)} of {len(recording.requests)} requests failed")


def _build(recording: Recording, max_tokens: int, cache_dir: Path) -> int:
    """Build the kernels of the calls with up to ``max_tokens`` tokens; returns their number."""
    environ = Environ.read(os.environ)
    gpu = gpu_named(recording.gpu)
    library = LibraryOptions(library=recording.library, gpu=recording.gpu)
    with progress("ask the library") as shown:
        target = target_of(library, gpu, environ, ask=True, progress=counting(shown))
        result = plan_calls(recording, max_tokens, target)
    with progress("compile") as show:
        report = api.compile(
            result.plan, target, cache_dir, environ=environ, title=result.title, progress=show
        )
    built = f"{report.built} built, {report.present} already there"
    _say(f"{len(result.plan.kernels)} kernels for up to {max_tokens} tokens: {built}")
    if report.failed:
        raise WorkFailedError(f"{len(report.failed)} kernels do not compile")
    return len(result.plan.kernels)


def _other_length(tokens: int) -> int:
    """A prompt length that the first rehearsal did not ask for."""
    return tokens - tokens // 3 if tokens > 2 else tokens + 1


def _with_dummy(command: tuple[str, ...], dummy: tuple[str, ...]) -> tuple[str, ...]:
    """The command with the options for random weights and no tokenizer that it lacks."""
    given = {word.partition("=")[0] for word in command}
    added: list[str] = []
    for word in dummy:
        if word.startswith("--"):
            wanted = word not in given
        if wanted:
            added.append(word)
    return (*command, *added)


def _say(line: str) -> None:
    print(f"[runner rehearse] {line}", file=sys.stderr, flush=True)
