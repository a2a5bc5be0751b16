"""The library itself as a source of tables: called with every M on a stand-in GPU.

The GPU does nothing and the compiler compiles nothing. After every call the stand-in says which of
its kernels the library launched, so a table is the library's own answer, M by M. Answers are kept
in the user's cache folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from runner.config.environ import Environ, available_cores, cache_folder
from runner.errors import UserError
from runner.kernels.entry import SOURCE, kernel_name
from runner.kernels.installed import Library, own_headers
from runner.kernels.kernel import Kernel
from runner.kernels.keys import INCLUDE, Recipe, with_variables
from runner.kernels.library_calls import call_library
from runner.kernels.nvcc import keys_for
from runner.kernels.table import (
    Demand,
    KernelTable,
    Origin,
    RecordedTable,
    Run,
    Source,
    by_shape,
    join_runs,
    merge_tables,
)
from runner.kernels.table_file import read_table, write_table
from runner.kernels.types import DeepGemmKernelType, GemmShape
from runner.standin.build import read_compiles, standin_environment
from runner.standin.gpus import Gpu

_ALWAYS = Demand(GemmShape(DeepGemmKernelType.GEMM_NT_F8F8BF16, 128, 128, 1, 2), (1,))
"""A GEMM that is always compiled, so that the library's compiler flags are seen."""


@dataclass(eq=False)
class LibrarySource:
    """Asks an installed library of any version about any GPU.

    Attributes:
        library: this Python has a CUDA build of torch that it works with.
        version_text: what ``nvcc --version`` prints on the machine that will run.
        environ: the variables that change the compiler's flags.
        progress: called with (GEMMs asked, of how many).
    """

    library: Library
    gpu: Gpu
    version_text: str
    environ: Environ
    progress: Callable[[int, int], None] = lambda done, total: None
    _table: RecordedTable | None = field(default=None, repr=False)

    @property
    def origin(self) -> Origin:
        gpu, title, generation = self.gpu, self.library.title, self.library.generation
        return Origin(title, generation, gpu.name, gpu.num_sms, gpu.arch, Source.LIBRARY)

    def table(self, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        """See :class:`runner.kernels.source.KernelSource`; asks only what is not known yet."""
        merged = by_shape(demands())
        if not merged:
            raise UserError("no GEMM was asked for: give a model or --gemm")
        self._table = self._table or self._read_memo()
        if _lacking(self._table, merged):
            # All ranks of a node come here at once: one asks, the others read its answers.
            with _locked(self._memo):
                self._table = self._read_memo()
                if missing := _lacking(self._table, merged):
                    asked = self._ask(missing)
                    self._table = merge_tables(self._table, asked) if self._table else asked
                    with suppress(OSError):  # Without a memo only the next run takes longer.
                        write_table(self._memo, self._table)
        assert self._table is not None
        origin = replace(self.origin, arch=self._table.recipe.arch)
        recipe = with_variables(self._table.recipe, self.environ)
        return replace(self._table, origin=origin, recipe=recipe)

    @property
    def _memo(self) -> Path:
        """File of the answers, named after what decides them."""
        decisive = [self.library.fingerprint, self.gpu.name, self.gpu.num_sms, _code_digest()]
        digest = sha256(json.dumps(decisive).encode()).hexdigest()[:16]
        name = f"{self.library.name}-{self.library.version}-{digest}.json.gz"
        return cache_folder(os.environ) / "tables" / name

    def _read_memo(self) -> RecordedTable | None:
        try:
            return read_table(self._memo)
        except UserError:
            return None

    def _ask(self, demands: Sequence[Demand]) -> RecordedTable:
        # The DG_JIT_* variables change the library's flags only: see table().
        plain = {k: value for k, value in os.environ.items() if not k.startswith("DG_JIT_")}
        with tempfile.TemporaryDirectory(prefix="deepgemm-ask-") as folder:
            entries = Path(folder) / "cache" / "cache"
            entries.parent.mkdir()
            environment = standin_environment(
                self.gpu,
                python=Path(sys.executable),
                environment=plain,
                version_text=self.version_text,
                work_dir=Path(folder),
            )
            environment["DG_JIT_CACHE_DIR"] = str(entries.parent)
            results = call_library(
                self.library,
                by_shape([_ALWAYS, *demands]),
                environment,
                jobs=available_cores(),
                progress=self.progress,
            )
            recipe = _read_recipe(self.library, read_compiles(Path(folder)), entries)
            names = {name for _, runs in results for *_, ran in runs for name in ran}
            kernels = {name: self._read_kernel(entries / name, recipe) for name in names}
        runs = {}
        for demand, found in results:
            each = (Run(a, b, tuple(kernels[name] for name in ran)) for a, b, ran in found)
            runs[demand.shape] = join_runs(demand.shape, each)
        included = {name for kernel in kernels.values() for name in own_headers(kernel.body)}
        headers = {name: self.library.header_hash(name) for name in included}
        return RecordedTable(self.origin, recipe, runs, headers)

    def _read_kernel(self, entry: Path, recipe: Recipe) -> Kernel:
        """The kernel of a cache entry, after a check that we give it the same key."""
        source = (entry / SOURCE).read_bytes().decode()
        kernel = Kernel.of_source(kernel_name(entry.name), source)
        keys = keys_for(self.library, recipe, self.version_text, self.library.root)
        if keys.cache_key(kernel) != entry.name:
            raise UserError(
                f"{self.library.title} names its cache entries in an unknown way ({entry.name} "
                f"instead of {keys.cache_key(kernel)}): this version is not supported"
            )
        return kernel


def _lacking(known: RecordedTable | None, demands: Sequence[Demand]) -> Sequence[Demand]:
    """The part of the demands that a table does not know."""
    if known is None:
        return demands
    lacking = (replace(demand, ms=known.lacking(demand)) for demand in demands)
    return [demand for demand in lacking if demand.ms]


@contextmanager
def _locked(memo: Path) -> Iterator[None]:
    """Keep other processes from the memo; if that is impossible, all of them ask."""
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        lock = memo.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@lru_cache
def _code_digest() -> str:
    """Digest of the code that calls the library and stands in for its GPU."""
    package = Path(__file__).parents[1]
    code = "deep_gemm_wrapper/*.py", "standin/native/*.[ch]", "standin/*.py", "kernels/library*.py"
    files = sorted(path for pattern in code for path in package.glob(pattern))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _read_recipe(library: Library, compiles: Sequence[Sequence[str]], entries: Path) -> Recipe:
    """How the library compiles, from the arguments that it gave its compiler."""
    flags = {_flags(arguments, library.include_path) for arguments in compiles}
    if len(flags) != 1:
        raise UserError(
            f"{library.title} compiles with {len(flags)} sets of flags: this version is not "
            "supported"
        )
    if library.generation == 1:
        return Recipe(1, flags.pop())
    account = json.loads(next(entries.glob("*/meta.json")).read_bytes())
    options = json.dumps(account["compiler_options"], sort_keys=True)
    return Recipe(2, flags.pop(), account["config"]["extra_signature"], options)


def _flags(arguments: Sequence[str], include_path: Path) -> tuple[str, ...]:
    """A compile's arguments without source and output, and with a placeholder for the path."""
    outputs = ("-o", "--output-file")
    return tuple(
        word.replace(str(include_path), INCLUDE)
        for before, word in zip(("", *arguments), arguments, strict=False)
        if not word.endswith(f"/{SOURCE}")
        and word not in (*outputs, "-cubin", "--cubin")
        and before not in outputs
    )
