"""nvcc as DeepGEMM calls it: what keys hold of it, its flags, and one compile."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from runner.cache.keys import CacheKeys, FirstKeys, Recipe, SecondKeys
from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.installed import Headers, Library

OLDEST_RELEASE = (12, 9)
"""Oldest nvcc whose flags are those that the library's current versions use."""

_RELEASE = re.compile(r"(?:release |NVCC)(\d+)\.(\d+)")


class CompileError(Exception):
    """nvcc refused a kernel; the text holds the compiler's own words."""


@dataclass(frozen=True)
class NvccCompiler:
    """Compiles kernels of one library for one GPU with one nvcc.

    Attributes:
        nvcc: the program that is run (may be a recording shim around the real one).
        library: where the headers come from.
        recipe: how the library compiles for that GPU.
    """

    nvcc: Path
    library: Library
    recipe: Recipe

    @cached_property
    def version_text(self) -> str:
        """All that ``nvcc --version`` prints.

        Raises:
            UserError: not an nvcc, or one too old for the flags.
        """
        return nvcc_version(self.nvcc)

    @property
    def signature(self) -> str:
        """What cache keys hold of the program."""
        return signature_of(self.version_text, self.recipe.generation)

    @property
    def arguments(self) -> list[str]:
        """nvcc's arguments besides source and output."""
        return self.recipe.arguments(self.library.include_path)

    @cached_property
    def keys(self) -> CacheKeys:
        """Keys for this machine."""
        return keys_for(self.library, self.recipe, self.version_text, self.library.root)

    def compile(self, source_path: Path, cubin_path: Path, work_dir: Path) -> None:
        """Compile ``source_path`` to ``cubin_path``; nvcc runs in ``work_dir``.

        Raises:
            CompileError: nvcc failed.
        """
        command = [str(self.nvcc.absolute()), str(source_path), "-cubin", "-o", str(cubin_path)]
        done = subprocess.run(
            command + self.arguments, capture_output=True, text=True, cwd=work_dir, check=False
        )
        if done.returncode:
            raise CompileError((done.stderr or done.stdout).strip() or f"exit {done.returncode}")


def keys_for(library: Headers, recipe: Recipe, version_text: str, root: Path) -> CacheKeys:
    """Keys of a library for a machine.

    Args:
        library: the headers, on this machine.
        recipe: how the library compiles there.
        version_text: what that machine's ``nvcc --version`` prints.
        root: that machine's ``deep_gemm`` folder; only the first generation's keys hold it.

    Raises:
        UserError: the library's JIT is of another generation than the recipe.
    """
    if isinstance(library, Library) and library.generation != recipe.generation:
        raise UserError(
            f"{library.root} does not look like {library.title}: its compiled part (_C*.so) is "
            "missing or another version's; install it again"
        )
    signature = signature_of(version_text, recipe.generation)
    if recipe.generation == 1:
        return FirstKeys(library, recipe, signature, root / "include")
    return SecondKeys(library, recipe, signature)


def nvcc_version(nvcc: Path) -> str:
    """All that ``nvcc --version`` prints.

    Raises:
        UserError: not an nvcc, or one older than :data:`OLDEST_RELEASE`.
    """
    command = [str(nvcc.absolute()), "--version"]
    try:
        words = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise UserError(f"{nvcc} cannot be run as nvcc: {error.strerror}") from None
    if not _RELEASE.search(words):
        raise UserError(f"{nvcc} --version names no release: is it nvcc?")
    major, minor = release_of(words)
    if (major, minor) < OLDEST_RELEASE:
        raise UserError(f"{nvcc} is release {major}.{minor}: 12.9 or newer is needed")
    return words


def signature_of(version_text: str, generation: int) -> str:
    """What a generation's keys hold of a compiler: ``NVCC<release>``, or the whole text."""
    return "NVCC{}.{}".format(*release_of(version_text)) if generation == 1 else version_text


def release_of(text: str) -> tuple[int, int]:
    """CUDA release that a compiler's text or signature (``NVCC13.0``) names.

    Raises:
        UserError: it names none.
    """
    match = _RELEASE.search(text)
    if not match:
        raise UserError(
            f"the compiler's text {text!r} names no CUDA release, such as NVCC13.0 or 'release "
            "13.0'"
        )
    return int(match[1]), int(match[2])


def find_nvcc(environ: Environ) -> Path | None:
    """The nvcc to use: DG_JIT_NVCC_COMPILER, CUDA_HOME, PATH, then the pip-installed toolkit.

    Raises:
        UserError: DG_JIT_NVCC_COMPILER names something that is no file.
    """
    if environ.dg_jit_nvcc_compiler:
        chosen = Path(environ.dg_jit_nvcc_compiler)
        if not chosen.is_file():
            raise UserError(f"DG_JIT_NVCC_COMPILER={chosen} is not a file: it must be nvcc")
        return chosen
    for home in (environ.cuda_home, environ.cuda_path):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return Path(home) / "bin" / "nvcc"
    on_path = shutil.which("nvcc", path=environ.search_path or None)
    if on_path:
        return Path(on_path)
    return _pip_nvcc()


def _pip_nvcc() -> Path | None:
    """nvcc of the ``nvcc`` extra: ``site-packages/nvidia/cu13/bin/nvcc``."""
    for scheme in ("purelib", "platlib"):
        candidate = Path(sysconfig.get_path(scheme)) / "nvidia" / "cu13" / "bin" / "nvcc"
        if candidate.is_file():
            return candidate
    return None
