"""The library as a second source of truth: walk it, and collect the kernels that it asks for.

Each GEMM is walked in a process of its own, with a cache of its own and a compiler that compiles
nothing: every compile yields the same blank kernel, which the library loads and launches. It works
for any version of the library that calls nvcc.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from runner.errors import UserError
from runner.jit.kernel_type import DeepGemmKernelType
from runner.jit.plan import Demand, GemmShape
from runner.jit.shim import write_shim

_BLANK_SOURCE = 'extern "C" __global__ void blank() {}\n'


@dataclass(frozen=True)
class AskedKernel:
    """A kernel that the library asked its compiler for.

    Attributes:
        shape: the GEMM that was walked.
        m: the M at which it was asked for first.
        key: name of the cache directory that the library made.
        source: the generated source.
    """

    shape: GemmShape
    m: int
    key: str
    source: str


def library_kernels(
    demands: Sequence[Demand],
    *,
    nvcc: Path,
    environment: Mapping[str, str],
    cache_dir: Path | None = None,
    jobs: int = 8,
    say: Callable[[str], None] = lambda line: None,
) -> list[AskedKernel]:
    """Walk the library over all demands.

    Args:
        demands: GEMMs with their M.
        nvcc: the real compiler; it makes the blank kernel and answers for its version.
        environment: what the walkers run in.
        cache_dir: kernels that are there already; they are run, and only what is missing is asked
            for. The directory itself is not written.
        jobs: walkers at a time, all on one GPU.
        say: told a line for each GEMM walked.

    Raises:
        UserError: no GPU, no library, or a walker failed; the message has its words.
    """
    groups: dict[tuple[DeepGemmKernelType, int, int, int], list[Demand]] = {}
    for demand in demands:
        shape = demand.shape
        groups.setdefault((shape.type, shape.n, shape.k, shape.num_sms), []).append(demand)
    with tempfile.TemporaryDirectory(prefix="deepgemm-walk-") as folder:
        blank = _make_blank(Path(folder), nvcc)

        def walk_group(item: tuple[int, list[Demand]]) -> list[AskedKernel]:
            index, group = item
            place = Path(folder) / f"walk{index}"
            place.mkdir()
            found = _walk_apart(group, place, nvcc, blank, environment, cache_dir)
            say(f"{group[0].shape.describe()}: {len(found)} asked for")
            return found

        heavy_first = sorted(groups.values(), key=lambda group: -sum(len(d.ms) for d in group))
        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(walk_group, enumerate(heavy_first)))
    return [kernel for found in results for kernel in found]


def _make_blank(folder: Path, nvcc: Path) -> Path:
    source, cubin = folder / "blank.cu", folder / "blank.cubin"
    source.write_text(_BLANK_SOURCE)
    command = [str(nvcc), str(source), "-cubin", "-arch=sm_90a", "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{nvcc} cannot make a blank kernel: {done.stderr.strip()}")
    return cubin


def _walk_apart(
    group: Sequence[Demand],
    place: Path,
    nvcc: Path,
    blank: Path,
    environment: Mapping[str, str],
    cache_dir: Path | None,
) -> list[AskedKernel]:
    """Walk in a process of its own and read what its compiler was asked for."""
    cache, log = place / "cache", place / "log"
    _overlay(cache, cache_dir)
    before = {path.name for path in (cache / "cache").iterdir()}
    shim = write_shim(place / "nvcc", nvcc=nvcc, log_dir=log, blank=blank)
    orders = {
        "log": str(log),
        "nvcc": str(shim),
        "cache": str(cache),
        "demands": [[*_plain(demand.shape), _compact(demand.ms)] for demand in group],
    }
    done = subprocess.run(
        [sys.executable, "-m", "runner.deep_gemm_wrapper.walk_worker"],
        input=json.dumps(orders),
        capture_output=True,
        text=True,
        check=False,
        env=dict(environment),
    )
    if done.returncode:
        words = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
        raise UserError(f"walking {group[0].shape.describe()} through the library failed: {words}")
    asked = json.loads(done.stdout.splitlines()[-1])
    made = {
        (path / "kernel.cu").read_text(): path.name
        for path in (cache / "cache").iterdir()
        if path.name not in before
    }
    return [AskedKernel(group[index].shape, m, made[source], source) for index, m, source in asked]


def _overlay(cache: Path, below: Path | None) -> None:
    """A cache that shows the entries of ``below`` and takes new ones itself."""
    (cache / "cache").mkdir(parents=True)
    if below is not None and (below / "cache").is_dir():
        for entry in (below / "cache").iterdir():
            (cache / "cache" / entry.name).symlink_to(entry.resolve())


def _plain(shape: GemmShape) -> list[int | str]:
    return [shape.type.name, shape.n, shape.k, shape.num_groups, shape.num_sms]


def _compact(ms: Sequence[int]) -> list[int]:
    """A range as [start, stop, step], which :func:`expand` undoes; other sequences as they are."""
    step = ms[1] - ms[0] if len(ms) > 1 else 1
    candidate = range(ms[0], ms[-1] + 1, step)
    if len(ms) > 3 and len(candidate) == len(ms) and tuple(candidate) == tuple(ms):
        return [-1, candidate.start, candidate.stop, candidate.step]
    return list(ms)


def expand(ms: Sequence[int]) -> Sequence[int]:
    """M from what :func:`_compact` made."""
    return range(ms[1], ms[2], ms[3]) if ms[0] == -1 else ms


def walker_environment() -> dict[str, str]:
    """This process's environment for the walkers, without what would make the library talk."""
    quiet = ("DG_JIT_DEBUG", "DG_PRINT_CONFIGS", "DG_JIT_PTXAS_VERBOSE", "DG_JIT_PRINT_LOAD_TIME")
    return {name: value for name, value in os.environ.items() if name not in quiet}
