"""One lock a GEMM among the ranks of a node, so that only one of them compiles its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.cache.lock import take_lock
from runner.errors import UserError
from runner.kernels.types import GemmShape


class CompileLocks:
    """Locks as files beside the node's cache, as SGLang has them; they go with their holder."""

    def __init__(self, cache_root: Path) -> None:
        self._folder = cache_root / "locks"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self._folder}: {error.strerror}") from None

    @contextmanager
    def held(self, shape: GemmShape) -> Iterator[None]:
        """Hold the lock of a GEMM, whatever its M."""
        name = f"{shape.type.name}_n{shape.n}_k{shape.k}_g{shape.num_groups}.lock"
        with (self._folder / name).open("w") as file:
            take_lock(file, self._folder)
            yield
