"""An installed DeepGEMM: found without importing it, because importing needs a CUDA torch."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from runner.errors import UserError
from runner.kernels.digest import DeepJitDigest, hex_digest

LIBRARIES = {
    "sgl-deep-gemm": "deep_gemm",
    "deep_gemm": "deep_gemm",
    "vllm": "vllm/third_party/deep_gemm",
}
"""Names that ``--library`` accepts, and the path of each in a site-packages folder."""

_INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"](deep_gemm/[^>\"]+)[>\"]", re.MULTILINE)
_VERSION = re.compile(r"^__version__ = ['\"]([^'\"]+)['\"]", re.MULTILINE)
_COMMITTED = b".committed"
"""Name of the file that marks a complete cache entry; only the second JIT generation has it."""


class Headers(Protocol):
    """Hashes of a library's headers."""

    def header_hash(self, header: str) -> str:
        """Hash over a header and the library's headers that it includes, recursively.

        Args:
            header: path below the include folder, such as ``deep_gemm/impls/smxx_layout.cuh``.
        """


@dataclass
class Library:
    """A ``deep_gemm`` package.

    Attributes:
        root: the package's folder, which has ``include/`` in it.
        name: the distribution that it is part of: ``sgl-deep-gemm``, ``vllm`` or ``deep_gemm``.
    """

    root: Path
    name: str = "sgl-deep-gemm"
    version: str = "of unknown version"
    _hashes: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def include_path(self) -> Path:
        return self.root / "include"

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}"

    @cached_property
    def generation(self) -> int:
        """Generation of the library's JIT: 2 since sgl-deep-gemm 0.2.0 (DeepJIT), 1 before."""
        return 2 if any(_COMMITTED in path.read_bytes() for path in self.extensions) else 1

    @property
    def python(self) -> Path:
        """The interpreter that imports it: the one of its environment, else this one."""
        for folder in self.root.parents:
            if folder.name in ("site-packages", "dist-packages") and len(folder.parents) > 2:
                prefix = folder.parents[2]
                python = prefix / "bin" / "python"
                if prefix != Path(sys.prefix) and python.is_file():
                    return python
        return Path(sys.executable)

    @property
    def extensions(self) -> list[Path]:
        return sorted(self.root.glob("_C*.so"))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the kernels: compiled modules and Python files."""
        files = [*self.extensions, *sorted(self.root.rglob("*.py"))]
        return hex_digest(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files))

    def header_hash(self, header: str) -> str:
        if header not in self._hashes:
            text = (self.include_path / header).read_bytes().decode()
            if self.generation == 1:
                found = hex_digest(f"{_included_hashes(self, text)}#{hex_digest(text)}")
            else:
                digest = DeepJitDigest().update(text)
                for name in own_headers(text):
                    digest = digest.update(self.header_hash(name))
                found = digest.hex
            self._hashes[header] = found
        return self._hashes[header]


def include_hash(headers: Headers, code: str) -> str:
    """Hash over the headers of a generated source, computed as in the first JIT generation."""
    return hex_digest(_included_hashes(headers, code))


def _included_hashes(headers: Headers, text: str) -> str:
    return "".join(f"{headers.header_hash(name)}$" for name in own_headers(text))


def own_headers(text: str) -> list[str]:
    """The library's headers that a text includes, in order."""
    return _INCLUDE.findall(text)


def find_library(name: str | None = None) -> Library | None:
    """The library to use, or None if there is none.

    Args:
        name: a name in :data:`LIBRARIES`, ``NAME==VERSION``, or the path of the package's folder or
            its parent. None means the ``deep_gemm`` that this Python imports, else vLLM's copy.

    Raises:
        UserError: there is no such library at that path.
    """
    if name is None:
        return next(_installed("deep_gemm", "vllm"), None)
    distribution, _, version = name.partition("==")
    if distribution in LIBRARIES:
        fitting = (found for found in _installed(distribution) if version in ("", found.version))
        return next(fitting, None)
    path = Path(name)
    for root in _packages([path, path / "deep_gemm", path / LIBRARIES["vllm"]]):
        return _identify(root.absolute())
    raise UserError(
        f"--library {path} is not DeepGEMM: it has no include/deep_gemm; give one of "
        f"{', '.join(LIBRARIES)}, or the path of a deep_gemm folder"
    )


def _installed(*names: str) -> Iterator[Library]:
    for name in names:
        package, _, below = LIBRARIES[name].partition("/")
        spec = find_spec(package)
        folders = spec.submodule_search_locations if spec is not None else None
        yield from map(_identify, _packages(Path(folder, below) for folder in folders or ()))


def _packages(folders: Iterable[Path]) -> Iterator[Path]:
    return (folder for folder in folders if (folder / "include" / "deep_gemm").is_dir())


def _identify(root: Path) -> Library:
    """Name and version, from the files in the folder and next to it."""
    if version := _read_text(root / "VERSION"):
        return Library(root, "sgl-deep-gemm", version)
    if root.parent.name == "third_party":
        releases = sorted(root.parents[2].glob("vllm-*.dist-info"))
        if releases:
            return Library(root, "vllm", releases[-1].name.split("-")[1].removesuffix(".dist"))
    match = _VERSION.search(_read_text(root / "__init__.py"))
    return Library(root, "deep_gemm", match[1]) if match else Library(root, "deep_gemm")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""
