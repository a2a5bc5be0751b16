"""``runner plan --source library`` and ``--check``: what the installed library itself asks for."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runner.cli.deployment import Planned, find_target
from runner.cli.guard import WorkFailedError
from runner.environ import Environ
from runner.errors import UserError
from runner.files import write_json
from runner.jit.check import FirstM, differences, planned_first_m
from runner.jit.compiler import find_nvcc
from runner.jit.describe import config_of_source, name_of_source
from runner.jit.plan import GemmShape, KernelUse
from runner.jit.plan_json import use_to_json


def ask_library(
    result: Planned, *, check: bool, cache_dir: Path | None, jobs: int, json_path: Path | None
) -> None:
    """Walk the library over the plan's GEMMs and print what it asks for.

    Raises:
        UserError: no GPU or no library here.
        WorkFailedError: ``check`` found differences, or ``cache_dir`` lacks kernels.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1")
    nvcc = _needs_gpu()
    from runner.deep_gemm_wrapper.library_source import library_kernels, walker_environment

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    asked = library_kernels(
        result.plan.demands,
        nvcc=nvcc,
        environment=walker_environment(),
        cache_dir=cache_dir,
        jobs=jobs,
        say=say,
    )
    first: dict[tuple[GemmShape, str], int] = {}
    sources = {}
    for kernel in asked:
        at = (kernel.shape, kernel.key)
        first[at] = min(kernel.m, first.get(at, kernel.m))
        sources[kernel.key] = kernel.source
    if json_path is not None:
        write_json(json_path, _as_json(result, first, sources), indent=1)
    calls = sum(len(demand.ms) for demand in result.plan.demands)
    if str(json_path) != "-":
        print(result.title)
        print(f"the library asked for {len(sources)} kernels in {calls} calls")
    if cache_dir is not None and sources:
        raise WorkFailedError(f"{cache_dir} lacks {len(sources)} kernels that the library asks for")
    if check:
        _check(result, first)


def _needs_gpu() -> Path:
    if find_spec("torch") is None or find_spec("deep_gemm") is None:
        raise UserError(
            "asking the library needs a Hopper GPU, torch and deep_gemm: "
            "pip install 'deepgemm-coldstart[torch,gpu]'"
        )
    import torch

    if not torch.cuda.is_available():
        raise UserError("asking the library needs a Hopper GPU: there is none here")
    nvcc = find_nvcc(Environ.read(os.environ))
    if nvcc is None:
        raise UserError("asking the library needs an nvcc: pip install 'deepgemm-coldstart[nvcc]'")
    return nvcc


def _check(result: Planned, asked: FirstM) -> None:
    target = find_target(None, None)
    if target.keys is None:
        raise UserError(target.lacking)
    lines = differences(planned_first_m(result.plan, target.keys), asked)
    for line in lines:
        print(line)
    if lines:
        raise WorkFailedError(f"{len(lines)} differences between our rules and the library")
    print(
        f"no difference: {len(result.plan.kernels)} kernels, each key and each first M is the "
        "library's"
    )


def _as_json(result: Planned, first: FirstM, sources: dict[str, str]) -> dict[str, Any]:
    """As a plan's JSON; of the M that run a kernel only the first is known."""
    kernels = []
    for key, source in sources.items():
        uses = [
            KernelUse(shape, ((m, m),), (0,)) for (shape, asked), m in first.items() if asked == key
        ]
        kernels.append(
            {
                "name": name_of_source(source),
                "cache_key": key,
                "config": config_of_source(source),
                "m_ranges": [[m, m] for m in sorted({use.m_ranges[0][0] for use in uses})],
                "uses": [use_to_json(use) for use in uses],
                "source": source,
            }
        )
    return {"version": 1, "source": "library", "for": result.title, "kernels": kernels}
