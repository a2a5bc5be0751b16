"""Find nvcc as DeepGEMM does, and read its release and its signature for cache keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.installed import Headers, Library
from runner.kernels.keys import CacheKeys, Recipe

OLDEST_RELEASE = (12, 9)
"""The oldest nvcc that supports the flags of the library's current versions."""

_SHOWN = 40
_RELEASE = re.compile(r"(?:release |NVCC)(\d+)\.(\d+)")


def keys_for(library: Headers, recipe: Recipe, version_text: str, root: Path) -> CacheKeys:
    """Keys for a machine with the library in ``root`` and an nvcc that prints ``version_text``.

    Raises:
        UserError: the library's JIT generation differs from the recipe's.
    """
    if isinstance(library, Library) and library.generation != recipe.generation:
        raise UserError(
            f"{library.root} does not look like {library.title}: its compiled module (_C*.so) is "
            "missing or of another version; install the library again"
        )
    signature = signature_of(version_text, recipe.generation)
    return CacheKeys(library, recipe, signature, root / "include")


def nvcc_version(nvcc: Path) -> str:
    """The output of ``nvcc --version``.

    Raises:
        UserError: this is not an nvcc, or it is older than :data:`OLDEST_RELEASE`.
    """
    command = [str(nvcc.absolute()), "--version"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise UserError(f"{nvcc} cannot be run as nvcc: {error.strerror}") from None
    if not _RELEASE.search(text):
        raise UserError(f"{nvcc} --version prints no release: is it nvcc?")
    major, minor = release_of(text)
    if (major, minor) < OLDEST_RELEASE:
        raise UserError(f"{nvcc} is release {major}.{minor}: 12.9 or newer is needed")
    return text


def signature_of(version_text: str, generation: int) -> str:
    """The compiler's part in a generation's keys: ``NVCC<release>``, or the whole text."""
    return "NVCC{}.{}".format(*release_of(version_text)) if generation == 1 else version_text


def release_of(text: str) -> tuple[int, int]:
    """The CUDA release in a compiler's version text or signature (``NVCC13.0``).

    Raises:
        UserError: the text has no release.
    """
    match = _RELEASE.search(text)
    if not match:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise UserError(
            f"the compiler's version text {shown!r} has no CUDA release, such as NVCC13.0 or "
            "'release 13.0'"
        )
    return int(match[1]), int(match[2])


def require_nvcc(environ: Environ) -> Path:
    """As :func:`find_nvcc`.

    Raises:
        UserError: there is no nvcc.
    """
    nvcc = find_nvcc(environ)
    if nvcc is None:
        raise UserError("there is no nvcc: pip install 'deepgemm-coldstart[nvcc]'")
    return nvcc


def find_nvcc(environ: Environ) -> Path | None:
    """The nvcc to use: DG_JIT_NVCC_COMPILER, CUDA_HOME, PATH, then the pip-installed toolkit.

    Raises:
        UserError: DG_JIT_NVCC_COMPILER is not a file.
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
    folders = (Path(sysconfig.get_path(scheme)) for scheme in ("purelib", "platlib"))
    found = (folder / "nvidia" / "cu13" / "bin" / "nvcc" for folder in folders)
    return next((path for path in found if path.is_file()), None)


_TOP = re.compile(r"^#\$ TOP=(.+)$", re.MULTILINE)


def toolkit_of(nvcc: Path) -> Path:
    """The CUDA toolkit of an nvcc, which may be a script on PATH that runs another one."""
    command = [str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        match = _TOP.search(done.stderr)
    except OSError:
        match = None
    return Path(match[1]).resolve() if match else nvcc.resolve().parent.parent
