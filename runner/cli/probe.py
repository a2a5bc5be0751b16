"""``runner probe``: measure how fast this machine compiles, compared with a profile."""

from __future__ import annotations

import os

import click

from runner.build.compiler import NvccCompiler
from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.installed import find_library
from runner.kernels.keys import first_recipe
from runner.kernels.nvcc import require_nvcc
from runner.kernels.rules import RULES, RULES_VERSION
from sim.costs.profile import load_profile


@click.command()
@click.option("--hardware", default="h200", show_default=True, help="Profile name or file.")
@click.option(
    "--repeats",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="Number of compiles of the reference kernel; the median counts.",
)
def probe(hardware: str, repeats: int) -> None:
    """Compile a reference kernel here and print the --host-factor for runner sim."""
    profile = load_profile(hardware)
    environ = Environ.read(os.environ)
    nvcc, library = require_nvcc(environ), find_library()
    if library is None or library.title != RULES.origin.library:
        raise UserError(
            "the reference kernel needs the headers of the version that profiles were measured "
            f"with: pip install --no-deps sgl-deep-gemm=={RULES_VERSION}"
        )
    here = NvccCompiler(nvcc, library, first_recipe(environ)).reference_seconds(repeats)
    there = profile.probe.seconds
    print(f"reference kernel: {here:.2f} s here, {there:.2f} s for {profile.name}")
    print(f"--host-factor {here / there:.2f}")
