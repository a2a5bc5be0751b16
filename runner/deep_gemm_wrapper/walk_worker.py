"""A walker process: orders on stdin, what was asked for on stdout, as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from runner.jit.kernel_type import DeepGemmKernelType
from runner.jit.plan import GemmShape


class _Log:
    """New compile records since the last look, cheap where there are none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[str] = set()

    def new_sources(self) -> list[str]:
        names = os.listdir(self._folder)  # noqa: PTH208  # called after every M: no Path objects
        if len(names) == len(self._seen):
            return []
        fresh = sorted(set(names) - self._seen)
        self._seen.update(fresh)
        return [(self._folder / name).read_text().partition("\n\n")[2] for name in fresh]


def main() -> None:
    """Walk what stdin orders."""

    from runner.deep_gemm_wrapper.configurer import import_deep_gemm
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper
    from runner.deep_gemm_wrapper.library_source import expand
    from runner.deep_gemm_wrapper.walker import walk

    orders: dict[str, Any] = json.load(sys.stdin)
    log = _Log(Path(orders["log"]))
    library = import_deep_gemm(
        cache_dir=Path(orders["cache"]), nvcc=Path(orders["nvcc"]), pdl=False
    )
    wrapper = DeepGemmWrapper(library)
    asked: list[tuple[int, int, str]] = []
    for index, (kind, n, k, groups, num_sms, ms) in enumerate(orders["demands"]):
        shape = GemmShape(DeepGemmKernelType[kind], n, k, groups, num_sms)

        def note(m: int, index: int = index) -> None:
            asked.extend((index, m, source) for source in log.new_sources())

        walk(wrapper, shape, expand(ms), note)
    print(json.dumps(asked))


if __name__ == "__main__":
    main()
