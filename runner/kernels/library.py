"""The library itself as a source of tables: called with every M on a stand-in GPU.

Each worker is a process of its own with a cache of its own, on a GPU that does nothing and with a
compiler that compiles nothing. Which of its kernels the library launches is read off the stand-in
after every call, so a table is the library's own word, M by M. What was asked once is kept in the
user's cache folder.
"""

from __future__ import annotations

import fcntl
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from runner.build.compiler import keys_for
from runner.cache.entry import SOURCE, kernel_name
from runner.cache.keys import INCLUDE, Recipe, with_variables
from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.installed import Library, own_headers
from runner.kernels.kernel import Kernel
from runner.kernels.recorded import merged, read_table, step_of, write_table
from runner.kernels.table import (
    Demand,
    KernelTable,
    Origin,
    RecordedTable,
    Run,
    Source,
    by_shape,
    join_runs,
)
from runner.kernels.types import DeepGemmKernelType, GemmShape
from runner.kernels.worker import ask, shared_out
from runner.standin.build import standin_environment
from runner.standin.gpus import Gpu

_ANY = Demand(GemmShape(DeepGemmKernelType.GEMM_NT_F8F8BF16, 128, 128, 1, 2), (1,))
"""Some GEMM that is compiled: it tells how the library compiles, also where nothing else does."""


@dataclass(eq=False)
class LibrarySource:
    """Asks an installed library, whatever its version and whatever GPU.

    Attributes:
        library: the library; this Python has a CUDA build of torch that it works with.
        gpu: the GPU that is stood in for.
        version_text: what ``nvcc --version`` prints on the machine that will run.
        environment: of this process.
        memo_dir: where answers are kept.
        jobs: workers at a time.
        progress: told (GEMMs asked, of how many).
    """

    library: Library
    gpu: Gpu
    version_text: str
    environment: Mapping[str, str]
    memo_dir: Path
    jobs: int
    progress: Callable[[int, int], None] = lambda done, total: None
    _table: RecordedTable | None = field(default=None, repr=False)

    @property
    def origin(self) -> Origin:
        """Known before anything is asked."""
        return Origin(
            self.library.title,
            self.library.generation,
            self.gpu.name,
            self.gpu.sms,
            self.gpu.arch,
            Source.LIBRARY,
        )

    def table(self, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        """See :class:`runner.kernels.source.KernelSource`; asks only for what is not known yet.

        Raises:
            UserError: the library cannot be called here, or not with such a GEMM.
        """
        wanted = by_shape(demands())
        if not wanted:
            raise UserError("no GEMM was asked for: give a model or --gemm")
        self._table = self._table or self._remembered()
        if _lacking(self._table, wanted):
            # Ranks of a node come here at once: one asks, the others read what it was told.
            with _turn(self._memo):
                self._table = self._remembered()
                if missing := _lacking(self._table, wanted):
                    self._learn(missing)
        assert self._table is not None
        recipe = with_variables(self._table.recipe, Environ.read(self.environment))
        return replace(self._table, recipe=recipe)

    def _learn(self, missing: Sequence[Demand]) -> None:
        asked = self._asked(missing)
        known = merged([self._table, asked] if self._table else [asked])
        self._table = replace(known, origin=self._told(known))
        with suppress(OSError):  # Then the next run takes as long, and nothing else.
            self._memo.parent.mkdir(parents=True, exist_ok=True)
            write_table(self._memo, self._table)

    def _remembered(self) -> RecordedTable | None:
        try:
            return replace(known := read_table(self._memo), origin=self._told(known))
        except UserError:
            return None

    def _told(self, known: RecordedTable) -> Origin:
        """What was asked before was asked of this library as well."""
        return replace(self.origin, arch=known.recipe.arch)

    @property
    def _memo(self) -> Path:
        """What decides answers: the library, the GPU, and how it is asked."""
        what = [self.library.fingerprint, self.gpu.name, self.gpu.sms, _how_we_ask()]
        digest = sha256(json.dumps(what).encode()).hexdigest()[:16]
        return self.memo_dir / f"{self.library.name}-{self.library.version}-{digest}.json.gz"

    def _asked(self, demands: Sequence[Demand]) -> RecordedTable:
        shares = [[_ANY, *share] for share in shared_out(demands, self.jobs)]
        done = 0

        def note() -> None:
            nonlocal done
            done += 1
            self.progress(done, len(demands))

        self.progress(0, len(demands))
        with ThreadPoolExecutor(len(shares)) as pool:
            return merged(list(pool.map(lambda share: self._walk(share, note), shares)))

    def _walk(self, demands: Sequence[Demand], note: Callable[[], None]) -> RecordedTable:
        """Ask in a process of its own."""
        with tempfile.TemporaryDirectory(prefix="deepgemm-ask-") as folder:
            place = Path(folder)
            cache = place / "cache"
            cache.mkdir()
            environment = standin_environment(
                self.gpu,
                python=Path(sys.executable),
                environment=_without_variables(self.environment),
                version_text=self.version_text,
                work_dir=place,
            )
            environment["DG_JIT_CACHE_DIR"] = str(cache)
            lines = ask(self.library, demands, environment, place / "words", note)
            compiles = Path(environment["DEEPGEMM_STANDIN_COMPILES"])
            return self._table_of(demands, lines, cache, compiles)

    def _table_of(
        self, demands: Sequence[Demand], lines: Sequence[Any], cache: Path, compiles: Path
    ) -> RecordedTable:
        keys = {Path(path).parent.name for line in lines for path in line["kernels"]}
        recipe = _recipe(compiles, cache, self.library)
        kernels = self._kernels(cache, keys, recipe)
        runs = {}
        for demand, line in zip(demands, lines, strict=True):
            called = [kernels[Path(path).parent.name] for path in line["kernels"]]
            found = [
                Run(first, last, tuple(called[number] for number in numbers))
                for first, last, numbers in line["runs"]
            ]
            runs[demand.shape] = join_runs(found, step_of(demand.shape.type))
        headers = {
            name: self.library.header_hash(name)
            for kernel in kernels.values()
            for name in own_headers(kernel.body)
        }
        return RecordedTable(replace(self.origin, arch=recipe.arch), recipe, runs, headers)

    def _kernels(self, cache: Path, keys: Iterable[str], recipe: Recipe) -> dict[str, Kernel]:
        """Kernels by the key that the library gave each, which must be the key that we make."""
        ours = keys_for(self.library, recipe, self.version_text, self.library.root)
        found = {}
        for key in keys:
            source = (cache / "cache" / key / SOURCE).read_bytes().decode()
            kernel = Kernel.of_source(kernel_name(key), source)
            if ours.cache_key(kernel) != key:
                raise UserError(
                    f"{self.library.title} names its entries in a way that is not known here "
                    f"({key} instead of {ours.cache_key(kernel)}): this version is not supported"
                )
            found[key] = kernel
        return found


def _lacking(known: RecordedTable | None, wanted: Sequence[Demand]) -> list[Demand]:
    """What a table does not know of the demands."""
    if known is None:
        return list(wanted)
    lacking = (replace(demand, ms=known.lacking(demand)) for demand in wanted)
    return [demand for demand in lacking if demand.ms]


@contextmanager
def _turn(memo: Path) -> Iterator[None]:
    """Hold the memo among processes; where that cannot be, all of them ask."""
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


def _without_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The library is asked without variables of its JIT: they change its flags alone."""
    return {name: value for name, value in environment.items() if not name.startswith("DG_JIT_")}


@lru_cache
def _how_we_ask() -> str:
    """Digest of what calls the library and stands in for its GPU: other code, other answers."""
    package = Path(__file__).parents[1]
    files = [
        *package.glob("deep_gemm_wrapper/*.py"),
        *package.glob("standin/native/*.[ch]"),
        package / "standin/gpus.py",
        Path(__file__),
    ]
    return sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def _recipe(compiles: Path, cache: Path, library: Library) -> Recipe:
    """How the library compiles, from what it told its compiler.

    Raises:
        UserError: it compiles in several ways.
    """
    flags = {
        _flags(line.split(_SEPARATOR)[1:], library.include_path)
        for line in compiles.read_bytes().decode().splitlines()
    }
    if len(flags) != 1:
        raise UserError(f"{library.title} compiles in {len(flags)} ways: it is not supported")
    if library.generation == 1:
        return Recipe(1, flags.pop())
    account = next((cache / "cache").glob("*/meta.json"))
    told = json.loads(account.read_bytes())
    options = json.dumps(told["compiler_options"], sort_keys=True)
    return Recipe(2, flags.pop(), told["config"]["extra_signature"], options)


_SEPARATOR = "\x1f"
_OUTPUT_OPTIONS = ("-o", "--output-file")
_KIND_OPTIONS = ("-cubin", "--cubin")


def _flags(arguments: Sequence[str], include_path: Path) -> tuple[str, ...]:
    """A compile's arguments without its source and output, and with a stand-in for the path."""
    kept = []
    before = ""
    for word in arguments:
        if not (
            word.endswith(f"/{SOURCE}")
            or word in (*_OUTPUT_OPTIONS, *_KIND_OPTIONS)
            or before in _OUTPUT_OPTIONS
        ):
            kept.append(word.replace(str(include_path), INCLUDE))
        before = word
    return tuple(kept)
