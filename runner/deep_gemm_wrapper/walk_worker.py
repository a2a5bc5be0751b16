"""One worker of :mod:`runner.kernels.library`: calls a library's entry points with every M.

Runs on a stand-in GPU, whose own functions report which JIT kernels each call launched. Orders come
as JSON on stdin. One line of JSON per GEMM goes to stdout: ``runs`` ([first M, last M, numbers of
kernels]) and ``kernels`` (paths of the cubins behind the numbers).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import TextIO, TypedDict

_MOST_LAUNCHES = 64
"""Of one call; each has a handful."""


class Orders(TypedDict):
    """The JSON on stdin."""

    library: str
    demands: list[tuple[int, int, int, int, int, int, list[int]]]
    """Type, n, k, groups, SMs, step from one M to the next, every M."""


class Launches:
    """Launches that the stand-in GPU has seen; a real GPU reports none."""

    def __init__(self) -> None:
        self._native = ctypes.CDLL(None)
        self._stood_in = hasattr(self._native, "standin_launches")
        if not self._stood_in:
            return
        self._native.standin_loaded.restype = ctypes.c_char_p
        self._buffer = (ctypes.c_uint32 * _MOST_LAUNCHES)()

    def take(self) -> tuple[int, ...]:
        """Numbers of the JIT libraries launched since the last call, in order, each once."""
        if not self._stood_in:
            return ()
        count = self._native.standin_launches(self._buffer, _MOST_LAUNCHES)
        return tuple(dict.fromkeys(self._buffer[:count]))

    def path(self, number: int) -> str:
        """The cubin behind a number."""
        loaded: bytes = self._native.standin_loaded(ctypes.c_uint32(number))
        return loaded.decode()

    def failed(self) -> list[str]:
        """Functions that were called and that the stand-in lacks."""
        if not self._stood_in:
            return []
        text = ctypes.create_string_buffer(1 << 16)
        self._native.standin_failed(text, len(text))
        return text.value.decode().split()


def main() -> int:
    """Carry out what stdin orders; exit code 1 and one line on stderr where that fails."""
    orders: Orders = json.load(sys.stdin)
    # What the library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _walk_all(orders, answers)
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        sys.stderr.write(f"\n{orders['library']}: {words[0][:500]}\n")
        return 1
    return 0


def _walk_all(orders: Orders, answers: TextIO) -> None:
    from runner.deep_gemm_wrapper.entrypoint import DeepGemmWrapper, import_library
    from runner.deep_gemm_wrapper.walker import walk
    from runner.kernels.types import DeepGemmKernelType, GemmShape

    wrapper = DeepGemmWrapper(import_library(Path(orders["library"])))
    launches = Launches()
    for kind, n, k, groups, num_sms, step, ms in orders["demands"]:
        shape = GemmShape(DeepGemmKernelType(kind), n, k, groups, num_sms)
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
            raise RuntimeError(f"it called {', '.join(failed)}, which is not stood in")
        print(json.dumps(runs.answer(launches)), file=answers, flush=True)


class _Runs:
    """Consecutive M that launch the same kernels."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._runs: list[tuple[int, int, tuple[int, ...]]] = []

    def add(self, m: int, numbers: tuple[int, ...]) -> None:
        """Note a call; a gap ends a run, since nothing is known of the M in it."""
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
