"""Write the bundled tables: the presets' GEMMs on the GPUs that profiles are for.

    python docs/measurements/bundle_tables.py LIBRARY...

asks each library, which must be installed along with a CUDA build of torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

from runner.config.environ import Environ
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV3, DSV4, DSV4_PRO
from runner.config.warmup import WarmupPolicy
from runner.kernels.installed import find_library
from runner.kernels.library import LibrarySource
from runner.kernels.nvcc import find_nvcc, nvcc_version
from runner.kernels.table import Demand
from runner.kernels.table_file import BUNDLED_FOLDER, BUNDLED_GPUS, write_table
from runner.planning.plan import run_demands
from runner.report.progress import counting, progress
from runner.scenario import Scenario
from runner.standin.gpus import gpu_named


def preset_demands(num_sms: int) -> Iterator[Demand]:
    """GEMMs of every preset at tp 1, 2, 4 and 8, with and without ep, and of its warm-ups."""
    policies = (WarmupPolicy.FULL, WarmupPolicy.RELAX)
    models, degrees = (DSV4, DSV4_PRO, DSV3), (1, 2, 4, 8)
    for model, tp, ep, policy in product(models, degrees, (False, True), policies):
        if ep and tp == 1:
            continue
        scenario = Scenario(
            model=model,
            parallel=ParallelConfig(tp=tp, ep=ep),
            policy=policy,
            num_sms=num_sms,
        )
        yield from run_demands(scenario)


def main(libraries: Sequence[str]) -> None:
    """Write the tables of each library for each GPU."""
    environ = Environ.read(os.environ)
    nvcc = find_nvcc(environ)
    assert nvcc is not None, "headers are hashed for a compiler"
    for name, gpu in product(libraries, map(gpu_named, BUNDLED_GPUS)):
        library = find_library(name)
        assert library is not None, f"{name} is not installed"
        with progress(f"{library.title} on {gpu.name}") as shown:
            source = LibrarySource(library, gpu, nvcc_version(nvcc), environ, counting(shown))
            table = source.table(partial(preset_demands, gpu.num_sms))
        path = BUNDLED_FOLDER / f"{library.name}-{library.version}-{gpu.name}.json.gz"
        write_table(path, table)
        print(f"{path.name}: {len(table.runs)} GEMMs, {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
