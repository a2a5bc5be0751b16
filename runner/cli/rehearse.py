"""``runner rehearse``: start a server on a stand-in GPU, and see what it calls."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from runner.cli.standin import GPU_OPTION, interpreter_of, version_text_of
from runner.config.environ import Environ, cache_folder
from runner.config.fields import OptionDetails, option
from runner.errors import UserError, WorkFailedError
from runner.files import write_json
from runner.kernels.nvcc import find_nvcc
from runner.options import with_options
from runner.recording.recording import to_json
from runner.recording.rehearsal import Rehearsal, rehearse_once
from runner.recording.server import KINDS, Server, kind_of
from runner.report.outputs import check_outputs
from runner.report.recording_table import print_recording
from runner.standin.build import MOST_DEVICES
from runner.standin.gpus import gpu_named


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
        None, OptionDetails("Kernel cache that the server finds.  [default: an empty one]")
    )
    ready_timeout: float = option(
        900.0, OptionDetails("Longest wait until the server is ready.", unit="SECONDS")
    )
    request_timeout: float = option(
        120.0, OptionDetails("Longest wait for the answer to a request.", unit="SECONDS")
    )
    json: Path | None = option(None, OptionDetails("Write the recording as JSON (- for stdout)."))


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
    with tempfile.TemporaryDirectory(prefix="deepgemm-rehearsal-") as folder:
        rehearsal = Rehearsal(
            command=_with_dummy(command, kind.dummy),
            gpu=gpu_named(gpu),
            devices=options.devices,
            python=interpreter_of(command),
            nvcc=find_nvcc(Environ.read(os.environ)),
            version_text=version_text_of(find_nvcc(Environ.read(os.environ))),
            folder=Path(folder),
            home=cache_folder(os.environ) / "rehearsal",
            cache=options.cache_dir,
            request_tokens=options.request_tokens,
            ready_timeout=options.ready_timeout,
            request_timeout=options.request_timeout,
        )
        recording, stacks = rehearse_once(rehearsal, Server(kind, command), os.environ, _say)
    if str(options.json) != "-":
        print_recording(recording)
    if options.json is not None:
        write_json(options.json, to_json(recording))
    if stacks:
        print(stacks, file=sys.stderr)
    if recording.ready is None:
        raise WorkFailedError("the server never became ready")
    failed = [request for request in recording.requests if request.error]
    if failed:
        raise WorkFailedError(f"{len(failed)} of {len(recording.requests)} requests failed")


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
