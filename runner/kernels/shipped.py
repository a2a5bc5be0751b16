"""Tables that ship with the package: the presets' GEMMs on the GPUs that profiles are for.

``python -m runner.kernels.shipped LIBRARY...`` asks each library, which must be installed beside a
CUDA build of torch, and writes its tables anew.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import resources
from itertools import product
from pathlib import Path

from runner.config.environ import available_cores
from runner.kernels.recorded import read_table, write_table
from runner.kernels.source import KernelSource
from runner.kernels.table import Demand, KernelTable, Origin, RecordedTable, by_shape
from runner.standin.gpus import Gpu, gpu_named

SHIPPED_GPUS = ("h200", "h20", "b200", "gb300", "rtx-pro-6000")
_FOLDER = Path(str(resources.files("runner.kernels"))) / "tables"
_SUFFIX = ".json.gz"


def shipped_gpu(gpu: Gpu) -> str:
    """The GPU whose tables hold for another: kernels follow from architecture and SMs alone."""
    for name in SHIPPED_GPUS:
        other = gpu_named(name)
        if (other.major, other.minor, other.sms) == (gpu.major, gpu.minor, gpu.sms):
            return name
    return gpu.name


def shipped_libraries(gpu: str) -> list[str]:
    """Names and versions of the libraries that tables of a GPU ship for, the newest first."""
    titles = (_title(path, gpu) for path in sorted(_FOLDER.glob(f"*-{gpu}{_SUFFIX}")))
    return sorted((title for title in titles if title), key=_age, reverse=True)


def _title(path: Path, gpu: str) -> str:
    name, _, version = path.name.removesuffix(f"-{gpu}{_SUFFIX}").rpartition("-")
    return f"{name} {version}" if name else ""


def _age(title: str) -> tuple[bool, list[int]]:
    """By version; SGLang's library comes first, since more servers than one ship it."""
    name, _, version = title.partition(" ")
    return name == "sgl-deep-gemm", [int(number) for number in re.findall(r"\d+", version)]


@lru_cache(maxsize=8)
def shipped_table(library: str, gpu: str) -> RecordedTable | None:
    """The table of a library (name and version) on a GPU, None where none ships."""
    path = _FOLDER / f"{library.replace(' ', '-')}-{gpu}{_SUFFIX}"
    return read_table(path) if path.is_file() else None


@dataclass(frozen=True)
class ShippedFirst:
    """What ships where that knows all that is asked for, else another source.

    Attributes:
        shipped: the table.
        otherwise: makes the other source; it may raise UserError.
    """

    shipped: RecordedTable
    otherwise: Callable[[], KernelSource]

    @property
    def origin(self) -> Origin:
        """The table's."""
        return self.shipped.origin

    def table(self, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        """See :class:`runner.kernels.source.KernelSource`."""
        wanted = by_shape(demands())
        if not any(self.shipped.lacking(demand) for demand in wanted):
            return self.shipped
        return self.otherwise().table(lambda: wanted)


def preset_demands(num_sms: int) -> Iterator[Demand]:
    """GEMMs of every preset at tp 1, 2, 4 and 8, with and without ep, and what warm-ups walk."""
    from runner.config.parallel import ParallelConfig
    from runner.config.presets import DSV3, DSV4, DSV4_PRO
    from runner.driver.warmup import WarmupOptions, WarmupPolicy
    from runner.scenario import Scenario, run_demands

    policies = (WarmupPolicy.FULL, WarmupPolicy.RELAX)
    for model, tp, ep, policy in product(
        (DSV4, DSV4_PRO, DSV3), (1, 2, 4, 8), (False, True), policies
    ):
        if ep and tp == 1:
            continue
        scenario = Scenario(
            model=model,
            parallel=ParallelConfig(tp=tp, ep=ep),
            warmup=WarmupOptions(policy=policy),
            num_sms=num_sms,
        )
        yield from run_demands(scenario)


def main(libraries: Sequence[str]) -> None:
    """Write the tables of each library for each GPU."""
    from runner.build.compiler import find_nvcc, nvcc_version
    from runner.config.environ import Environ, cache_folder
    from runner.kernels.installed import find_library
    from runner.kernels.library import LibrarySource
    from runner.report.progress import counting, progress

    nvcc = find_nvcc(Environ.read(os.environ))
    assert nvcc is not None, "headers are digested for a compiler"
    memo = cache_folder(os.environ) / "tables"
    for name, gpu in product(libraries, map(gpu_named, SHIPPED_GPUS)):
        library = find_library(name)
        assert library is not None
        with progress(f"{library.title} on {gpu.name}") as shown:
            source = LibrarySource(
                library,
                gpu,
                nvcc_version(nvcc),
                os.environ,
                memo,
                available_cores(),
                counting(shown),
            )
            table = source.table(partial(preset_demands, gpu.sms))
        assert isinstance(table, RecordedTable)
        _FOLDER.mkdir(exist_ok=True)
        path = _FOLDER / f"{library.name}-{library.version}-{gpu.name}{_SUFFIX}"
        write_table(path, table)
        print(f"{path.name}: {len(table.runs)} GEMMs, {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
