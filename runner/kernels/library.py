"""The library itself as a source of tables: it is called with every M on a stand-in GPU.

The GPU computes nothing and the compiler compiles nothing. After every call the stand-in reports
the kernels that the library launched, so a table is the library's own answer for each M. Answers
are stored in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from runner.config.environ import Environ, available_cores, cache_folder
from runner.errors import UserError
from runner.files import take_lock
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
"""A GEMM that is always compiled, to see the library's compiler flags."""


@dataclass(eq=False)
class LibrarySource:
    """Asks an installed library of any version about any GPU.

    Attributes:
        library: the library; this Python needs a CUDA build of torch that works with it.
        version_text: output of ``nvcc --version`` on the machine that will run.
        environ: the variables that change the compiler's flags.
        progress: called with (GEMMs done, total).
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
        """See :class:`runner.kernels.source.KernelSource`; asks only for what is not known yet."""
        merged = by_shape(demands())
        if not merged:
            raise UserError("there is no GEMM to plan: give a model or --gemm")
        self._table = self._table or self._read_memo()
        if _lacking(self._table, merged):
            # All ranks of a node get here at once: one asks, and the others read its answers.
            with _locked(self._memo):
                self._table = self._read_memo()
                if missing := _lacking(self._table, merged):
                    asked = self._ask(missing)
                    self._table = merge_tables(self._table, asked) if self._table else asked
                    with suppress(OSError):  # Without a memo the next run only takes longer.
                        write_table(self._memo, self._table)
        assert self._table is not None
        origin = replace(self.origin, arch=self._table.recipe.arch)
        recipe = with_variables(self._table.recipe, self.environ)
        return replace(self._table, origin=origin, recipe=recipe)

    @property
    def _memo(self) -> Path:
        """The file of answers; its name has a digest of everything that decides them."""
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
        # The DG_JIT_* variables change only the library's flags, and table() applies them later.
        plain = {k: value for k, value in os.environ.items() if not k.startswith("DG_JIT_")}
        with tempfile.TemporaryDirectory(prefix="deepgemm-ask-") as folder:
            entries = Path(folder) / "cache" / "cache"
            entries.parent.mkdir()
            environment = standin_environment(
                self.gpu,
                environment=plain,
                version_text=self.version_text,
                work_dir=Path(folder),
                python=self.library.python,
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
        """The kernel of a cache entry; checks that we compute the same key for it."""
        source = (entry / SOURCE).read_bytes().decode()
        kernel = Kernel.of_source(kernel_name(entry.name), source)
        keys = keys_for(self.library, recipe, self.version_text, self.library.root)
        if keys.cache_key(kernel) != entry.name:
            raise UserError(
                f"{self.library.title} is not supported: it names a cache entry {entry.name}, but "
                f"{keys.cache_key(kernel)} was expected"
            )
        return kernel


def _lacking(known: RecordedTable | None, demands: Sequence[Demand]) -> Sequence[Demand]:
    """The part of the demands that a table does not cover."""
    if known is None:
        return demands
    lacking = (replace(demand, ms=known.lacking(demand)) for demand in demands)
    return [demand for demand in lacking if demand.ms]


@contextmanager
def _locked(memo: Path) -> Iterator[None]:
    """Lock the memo against other processes; without a lock, every process asks by itself."""
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        lock = memo.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        take_lock(lock, memo.parent)
        yield


@lru_cache
def _code_digest() -> str:
    """Digest of our code that calls the library, and of the stand-in GPU."""
    package = Path(__file__).parents[1]
    code = (
        *("deep_gemm_wrapper/*.py", "standin/native/*.[ch]", "standin/*.py"),
        *("kernels/library*.py", "kernels/call_template.py"),
    )
    files = sorted(path for pattern in code for path in package.glob(pattern))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _read_recipe(library: Library, compiles: Sequence[Sequence[str]], entries: Path) -> Recipe:
    """The library's recipe, from the arguments with which it called its compiler."""
    flags = {_flags(arguments, library.include_path) for arguments in compiles}
    if len(flags) != 1:
        raise UserError(
            f"{library.title} is not supported: it compiles with {len(flags)} different sets of "
            "flags"
        )
    if library.generation == 1:
        return Recipe(1, flags.pop())
    meta = json.loads(next(entries.glob("*/meta.json")).read_bytes())
    options = json.dumps(meta["compiler_options"], sort_keys=True)
    return Recipe(2, flags.pop(), meta["config"]["extra_signature"], options)


def _flags(arguments: Sequence[str], include_path: Path) -> tuple[str, ...]:
    """A compile's arguments without source and output, with a placeholder for the include path."""
    outputs = ("-o", "--output-file")
    return tuple(
        word.replace(str(include_path), INCLUDE)
        for before, word in zip(("", *arguments), arguments, strict=False)
        if not word.endswith(f"/{SOURCE}")
        and word not in (*outputs, "-cubin", "--cubin")
        and before not in outputs
    )
