"""Sources of kernel tables: our rules, bundled tables, or the library itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.installed import Library
from runner.kernels.keys import first_recipe, with_variables
from runner.kernels.rules import RULES, RULES_ARCH, RULES_VERSION
from runner.kernels.table import Demand, KernelTable, Origin, RecordedTable, by_shape
from runner.kernels.table_file import bundled_gpu, bundled_libraries, bundled_table
from runner.standin.gpus import Gpu

_ANY_NVCC = (
    "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\n"
)
"""The stand-in compiler's version text when no cache keys are needed; kernels ignore it."""


class KernelSource(Protocol):
    """Provides kernel tables of one library on one GPU; hashable, so that callers can cache."""

    def __hash__(self) -> int: ...

    @property
    def origin(self) -> Origin:
        """The library and GPU of the tables; known before any table is made."""

    def table(self, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        """A table that covers at least ``demands()``; not every source needs to call it.

        Raises:
            UserError: the source does not cover a demand; the message names one that does.
            WorkFailedError: the library crashed.
        """


@dataclass(frozen=True)
class BundledFirst:
    """A bundled table if it covers all demands, else another source if there is one."""

    bundled: RecordedTable
    gpu: Gpu
    fallback: KernelSource | None

    @property
    def origin(self) -> Origin:
        return self.bundled.origin

    def table(self, demands: Callable[[], Iterable[Demand]]) -> KernelTable:
        merged = by_shape(demands())
        if not any(self.bundled.lacking(demand) for demand in merged):
            return self.bundled
        # One source answers all demands, so that all kernels are from one library.
        return _known(self.fallback, self.gpu).table(lambda: merged)


def choose_source(
    gpu: Gpu,
    library: Library | str | None,
    environ: Environ,
    *,
    version_text: str | None = None,
    always_ask: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> KernelSource:
    """The best source for a library on a GPU.

    Args:
        library: the installed library; or the name, or ``NAME==VERSION``, of one that is not
            installed; None means any.
        environ: the variables that change the compiler's flags.
        version_text: output of ``nvcc --version`` on the machine that will run, if known.
        always_ask: ask the library even if our rules or a bundled table have the answer.
        progress: called with (GEMMs done, total).

    Raises:
        UserError: no rules or tables cover this library and GPU, and there is no library to ask.
    """
    fallback: KernelSource | None = None
    if isinstance(library, Library):
        # Imported late: most commands never ask a library.
        from runner.kernels.library import LibrarySource

        fallback = LibrarySource(library, gpu, version_text or _ANY_NVCC, environ, progress)
    if always_ask:
        return _known(fallback, gpu)
    title = _choose_title(gpu, library)
    if gpu.arch == RULES_ARCH and (library is None or title == RULES.origin.library):
        fallback = RULES.on(gpu.name, gpu.num_sms, first_recipe(environ))
    table = bundled_table(title, bundled_gpu(gpu))
    if table is None or table.origin.num_sms != gpu.num_sms:
        return _known(fallback, gpu)
    if isinstance(library, Library) and not _same_headers(library, table):
        return _known(fallback, gpu)  # The build is patched but kept its version number.
    origin = replace(table.origin, gpu=gpu.name)
    recipe = with_variables(table.recipe, environ)
    return BundledFirst(replace(table, origin=origin, recipe=recipe), gpu, fallback)


def _choose_title(gpu: Gpu, library: Library | str | None) -> str:
    """Name and version of the library; if several match, the newest with a table."""
    if isinstance(library, Library):
        return library.title
    titles = bundled_libraries(bundled_gpu(gpu))
    if gpu.arch == RULES_ARCH:
        titles.append(RULES.origin.library)
    if library is None:
        return titles[0] if titles else ""
    name, _, version = library.partition("==")
    for title in titles:
        if title == f"{name} {version}" or (not version and title.startswith(name)):
            return title
    known = ", ".join(title.replace(" ", "==") for title in titles)
    raise UserError(
        f"--library {library} is not installed, and no table of it ships for this GPU: install it, "
        f"give the path of its deep_gemm folder, or use one that does ({known or 'none'})"
    )


def _same_headers(library: Library, table: RecordedTable) -> bool:
    try:
        return all(library.header_hash(name) == known for name, known in table.headers.items())
    except FileNotFoundError:
        return False


def _known(source: KernelSource | None, gpu: Gpu) -> KernelSource:
    if source is None:
        raise UserError(
            f"only the library itself knows its kernels for {gpu.name} ({gpu.arch}), and none is "
            "installed here: pip install 'deepgemm-coldstart[library]', or give one with --library "
            f"(our rules cover sgl-deep-gemm {RULES_VERSION} on Hopper GPUs only)"
        )
    return source
