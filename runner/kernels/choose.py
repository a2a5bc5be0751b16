"""Which source tells the kernels: our rules where they hold, the library itself elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from runner.cache.keys import first_recipe, with_variables
from runner.config.environ import Environ, available_cores, cache_folder
from runner.errors import UserError
from runner.kernels.installed import Library
from runner.kernels.rules import RULES, RULES_ARCH, RULES_VERSION
from runner.kernels.shipped import ShippedFirst, shipped_gpu, shipped_libraries, shipped_table
from runner.kernels.source import KernelSource
from runner.kernels.table import RecordedTable
from runner.standin.gpus import Gpu

_NO_TEXT = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\n"
"""What a stand-in compiler answers where no key is wanted: kernels do not hang on it."""


def choose_source(
    gpu: Gpu,
    library: Library | None,
    *,
    environ: Environ,
    environment: Mapping[str, str],
    version_text: str | None,
    wanted: str | None = None,
    ask: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> KernelSource:
    """The source for a library on a GPU: rules, a table that ships, or the library itself.

    Args:
        gpu: the GPU.
        library: the installed library; None where there is none.
        environ: the variables that change the compiler's flags.
        environment: what a library is asked in.
        version_text: of the compiler of the machine that will run, if known.
        wanted: name, or ``NAME==VERSION``, of a library that is not installed; None takes any.
        ask: ask the library even where that is known already.
        progress: told how far asking is.

    Raises:
        UserError: nobody knows, and there is no library to ask.
    """

    def asked() -> KernelSource:
        if library is None:
            raise _unknown(gpu)
        # Only where it is needed: the stand-in GPU is no part of a quick command.
        from runner.kernels.library import LibrarySource

        memo, jobs = cache_folder(environment) / "tables", available_cores()
        text = version_text or _NO_TEXT
        return LibrarySource(library, gpu, text, environment, memo, jobs, progress)

    def otherwise() -> KernelSource:
        ruled = RULES.origin.library
        meant = library.title if library is not None else title if wanted else ruled
        if meant == ruled and gpu.arch == RULES_ARCH:
            return RULES.on(gpu.name, gpu.sms, first_recipe(environ))
        return asked()

    if ask:
        return asked()
    twin = shipped_gpu(gpu)
    titles = shipped_libraries(twin)
    title: str | None
    if library is not None:
        title = library.title if library.title in titles else None
    else:
        ours = [RULES.origin.library] if gpu.arch == RULES_ARCH else []
        title = _named([*titles, *ours], wanted)
    table = shipped_table(title, twin) if title else None
    if table is None or table.origin.num_sms != gpu.sms:
        return otherwise()
    if library is not None and not _same_headers(library, table):
        return otherwise()  # A patched build under the version of another one.
    table = replace(
        table,
        origin=replace(table.origin, gpu=gpu.name),
        recipe=with_variables(table.recipe, environ),
    )
    return ShippedFirst(table, otherwise)


def _same_headers(library: Library, table: RecordedTable) -> bool:
    try:
        return all(library.header_hash(name) == told for name, told in table.headers.items())
    except FileNotFoundError:
        return False


def _named(titles: Sequence[str], wanted: str | None) -> str | None:
    """The first of the libraries with a name, and a version where one is given.

    Raises:
        UserError: there is none.
    """
    name, _, version = (wanted or "").partition("==")
    for title in titles:
        if title == f"{name} {version}" or (not version and title.startswith(name)):
            return title
    if wanted is None:
        return None
    known = ", ".join(title.replace(" ", "==") for title in titles)
    raise UserError(
        f"--library {wanted} is not installed, and no table of it ships for this GPU: install it, "
        f"give the path of its deep_gemm folder, or take one that does ({known or 'none'})"
    )


def _unknown(gpu: Gpu) -> UserError:
    return UserError(
        f"kernels for {gpu.name} ({gpu.arch}) are only known to the library itself, and none is "
        "installed here: pip install 'deepgemm-coldstart[library]', or give one with --library "
        f"(our rules hold for sgl-deep-gemm {RULES_VERSION} on Hopper GPUs only)"
    )
