"""One worker of :mod:`runner.kernels.library`: calls a library's entry points with every M.

It runs on a stand-in GPU, which reports the JIT kernels that each call launched. The request is
JSON on stdin. The answer on stdout has one line of JSON per GEMM: ``runs`` ([first M, last M,
kernel numbers]) and ``kernels`` (the cubin path for each number).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypedDict

if TYPE_CHECKING:
    from runner.kernels.table import Shape

_MOST_LAUNCHES = 64
"""Most launches that one call can make; real calls make a handful."""


class Request(TypedDict):
    """The JSON on stdin."""

    library: str
    demands: list[tuple[tuple[int | str, int, int], int, list[int]]]
    """For each GEMM or recorded call: the fields of its shape, step between M, all M."""


class Launches:
    """Launches on the stand-in GPU; a real GPU does not report any."""

    def __init__(self) -> None:
        self._native = ctypes.CDLL(None)
        self._stood_in = hasattr(self._native, "standin_launches")
        if not self._stood_in:
            return
        self._native.standin_loaded.restype = ctypes.c_char_p
        self._buffer = (ctypes.c_uint32 * _MOST_LAUNCHES)()

    def take(self) -> tuple[int, ...]:
        """Distinct numbers of the JIT kernels launched since the last call, in order."""
        if not self._stood_in:
            return ()
        count = self._native.standin_launches(self._buffer, _MOST_LAUNCHES)
        return tuple(dict.fromkeys(self._buffer[:count]))

    def path(self, number: int) -> str:
        """Path of the cubin with that number."""
        loaded: bytes = self._native.standin_loaded(ctypes.c_uint32(number))
        return loaded.decode()

    def failed(self) -> list[str]:
        """Functions that were called but that the stand-in does not have."""
        if not self._stood_in:
            return []
        text = ctypes.create_string_buffer(1 << 16)
        self._native.standin_failed(text, len(text))
        return text.value.decode().split()


def main() -> int:
    """Serve the request on stdin; on failure, exit with code 1 and one line on stderr."""
    request: Request = json.load(sys.stdin)
    # The library's own output goes to stderr, so that it does not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _walk_all(request, answers)
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        sys.stderr.write(f"\n{request['library']}: {words[0][:500]}\n")
        return 1
    return 0


def _walk_all(request: Request, answers: TextIO) -> None:
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper, import_library
    from runner.deep_gemm_wrapper.walker import walk

    wrapper = DeepGemmWrapper(import_library(Path(request["library"])))
    launches = Launches()
    for fields, step, ms in request["demands"]:
        shape = _shape_of(*fields)
        runs = _Runs(step)

        def note(m: int, runs: _Runs = runs) -> None:
            runs.add(m, launches.take())

        launches.take()
        try:
            walk(wrapper, shape, ms, note)
        except Exception as error:
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise RuntimeError(f"{shape.describe()}: {words[0]}") from error
        if failed := launches.failed():
            raise RuntimeError(f"it called {', '.join(failed)}, which the stand-in GPU lacks")
        print(json.dumps(runs.answer(launches)), file=answers, flush=True)


def _shape_of(kind: int | str, *sizes: int) -> Shape:
    from runner.kernels.call_template import CallShape
    from runner.kernels.types import DeepGemmKernelType, GemmShape

    if isinstance(kind, str):
        return CallShape(kind, *sizes)
    return GemmShape(DeepGemmKernelType(kind), *sizes)


class _Runs:
    """Consecutive M that launch the same kernels."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._runs: list[tuple[int, int, tuple[int, ...]]] = []

    def add(self, m: int, numbers: tuple[int, ...]) -> None:
        """Record a call; a gap in M ends a run, because the kernels in the gap are not known."""
        if self._runs and self._runs[-1][1:] == (m - self._step, numbers):
            self._runs[-1] = (self._runs[-1][0], m, numbers)
        else:
            self._runs.append((m, m, numbers))

    def answer(self, launches: Launches) -> dict[str, object]:
        used = sorted({number for _, _, numbers in self._runs for number in numbers})
        at = {number: index for index, number in enumerate(used)}
        return {
            "runs": [[a, b, [at[number] for number in numbers]] for a, b, numbers in self._runs],
            "kernels": [launches.path(number) for number in used],
        }


if __name__ == "__main__":
    sys.exit(main())
