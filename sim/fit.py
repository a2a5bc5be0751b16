"""Compile-time tables of a profile from measured compiles.

``python -m sim.fit WALK.jsonl...`` reads walks of the real library over M and prints the three
tables of a :class:`sim.profile.Profile` as JSON. Where compilers outnumbered cores their waiting
would count as well; give walks made with enough cores.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from runner.jit.kernel_type import DeepGemmKernelType as T
from runner.jit.kernel_type import KernelCall
from runner.jit.kernels import Kernel, kernels_of
from sim.profile import tile_key

_KINDS = {
    "fp8": T.GEMM_NT_F8F8BF16,
    "contig": T.GROUPED_GEMM_NT_F8F8BF16_CONTIG,
    "masked": T.GROUPED_GEMM_NT_F8F8BF16_MASKED,
    "bf16f32": T.GEMM_NT_BF16BF16F32,
    "hc": T.TF32_HC_PRENORM_GEMM,
}


def compile_tables(samples: Iterable[tuple[Kernel, float]]) -> dict[str, Any]:
    """Mean seconds by tile, by template and over all, from (kernel, seconds) samples."""
    by_tile: Mapping[str, list[float]] = defaultdict(list)
    by_name: Mapping[str, list[float]] = defaultdict(list)
    everything = []
    for kernel, seconds in samples:
        key = tile_key(kernel)
        by_tile[key].append(seconds)
        by_name[key.split()[0]].append(seconds)
        everything.append(seconds)
    return {
        "compile_by_tile": _means(by_tile),
        "compile_by_name": _means(by_name),
        "compile_default": round(fmean(everything), 3),
    }


def walk_samples(path: Path, num_sms: int = 132) -> list[tuple[Kernel, float]]:
    """Samples of a walk file: one GEMM a line, with the M and seconds of each new kernel.

    The walk's lines hold only the GEMM's own compiles, not its layout transposes.
    """
    samples = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for m, seconds in row["compiles"]:
            # The walk asked for these splits itself, without the cap that the model applies.
            splits = max(1, num_sms // -(-m // 64))
            groups = splits if row["kind"] == "hc" else row["g"]
            call = KernelCall(_KINDS[row["kind"]], m, row["n"], row["k"], groups, num_sms)
            samples.append((kernels_of(call)[-1], seconds))
    return samples


def _means(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {key: round(fmean(values), 3) for key, values in sorted(samples.items())}


def main(arguments: Sequence[str]) -> None:
    """Print the tables of the walk files given."""
    samples = [sample for name in arguments for sample in walk_samples(Path(name))]
    print(json.dumps(compile_tables(samples), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
