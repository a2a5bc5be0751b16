"""The ``runner`` command; it imports a subcommand only when it is used."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from runner import __version__
from runner.errors import run_guarded

_COMMANDS = {
    "sim": "Predict a start-up: run the same schedule in virtual time.",
    "sweep": "Simulate many layouts and policies: start-up time against coverage.",
    "overlap": "Compare two-batch overlap strategies, and find the best yield marks.",
    "plan": "List exactly the kernels that a deployment can ever need.",
    "compile": "Build a deployment's kernels ahead of time, without a GPU.",
    "cache": "List, verify, move and pack kernel caches.",
    "standin": "Run any command on GPUs that do nothing.",
    "record": "Run any server and record every DeepGEMM call.",
    "rehearse": "Start a server without its GPU, and see what it would compile.",
    "watch": "Run any server and report every DeepGEMM compile.",
    "probe": "Measure how fast this machine compiles, compared with a profile's.",
    "calibrate": "Fit a hardware profile to measured runs.",
    "compare": "Compare Timelines, or measured ones with their predictions.",
}


class _LazyGroup(click.Group):
    """Lists its commands by name and imports ``runner.cli.<name>`` on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"runner.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup)
@click.version_option(__version__, prog_name="runner")
def cli() -> None:
    """Predict, plan and end the cold start of DeepGEMM servers."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``runner`` console script."""
    # A command keeps nearly all objects to its end; searching for cycles takes a fifth of its time.
    gc.set_threshold(200_000, 50, 50)
    sys.exit(run_guarded(cli, arguments, program="runner"))
