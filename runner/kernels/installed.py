"""An installed DeepGEMM: found without importing it, because importing needs a CUDA torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from runner.cache.digest import DeepJitDigest, hex_digest
from runner.errors import UserError

_INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", re.MULTILINE)
_VERSION = re.compile(r"^__version__ = ['\"]([^'\"]+)['\"]", re.MULTILINE)
_OWN_HEADERS = "deep_gemm/"
_COMMITTED = b".committed"
"""Only JITs of the second generation mark an entry as whole, and so have this text in them."""

LIBRARIES = {
    "sgl-deep-gemm": "deep_gemm",
    "deep_gemm": "deep_gemm",
    "vllm": "vllm/third_party/deep_gemm",
}
"""Names that ``--library`` takes, and where each lies below a site-packages folder."""


class Headers(Protocol):
    """A library's headers, by their digests."""

    def header_hash(self, header: str) -> str:
        """Digest over a header and those it includes."""


@dataclass
class Library:
    """Root folder of a ``deep_gemm`` package (the folder that holds ``include/``).

    Attributes:
        name: what the package is part of: ``sgl-deep-gemm``, ``vllm`` or ``deep_gemm``.
        version: its version.
    """

    root: Path
    name: str = "sgl-deep-gemm"
    version: str = "of unknown version"
    _hashes: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def include_path(self) -> Path:
        """Folder given to the compiler as its include path."""
        return self.root / "include"

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"

    @cached_property
    def generation(self) -> int:
        """Of its JIT: 2 since sgl-deep-gemm 0.2.0 (DeepJIT), 1 before."""
        return 2 if any(_COMMITTED in path.read_bytes() for path in self.extensions) else 1

    @property
    def extensions(self) -> list[Path]:
        """The compiled parts."""
        return sorted(self.root.glob("_C*.so"))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what decides its kernels: the compiled parts and the Python around them."""
        files = [*self.extensions, *sorted(self.root.rglob("*.py"))]
        return hex_digest(b"".join(_sha256(path) for path in files))

    def header_hash(self, header: str) -> str:
        """Digest over ``header`` and the ``deep_gemm`` headers it includes, recursively.

        Args:
            header: path below the include folder, such as ``deep_gemm/impls/smxx_layout.cuh``.
        """
        if header not in self._hashes:
            text = (self.include_path / header).read_bytes().decode()
            self._hashes[header] = self._text_hash(text)
        return self._hashes[header]

    def _text_hash(self, text: str) -> str:
        if self.generation == 1:
            return hex_digest(f"{_children(self, text)}#{hex_digest(text)}")
        digest = DeepJitDigest().update(text)
        for header in own_headers(text):
            digest = digest.update(self.header_hash(header))
        return digest.hex


def include_hash(headers: Headers, code: str) -> str:
    """Digest over the headers of a generated source, as the first generation makes it."""
    return hex_digest(_children(headers, code))


def _children(headers: Headers, text: str) -> str:
    return "".join(f"{headers.header_hash(name)}$" for name in own_headers(text))


def own_headers(text: str) -> list[str]:
    """The library's own headers that a text includes, in order."""
    return [name for name in _INCLUDE.findall(text) if name.startswith(_OWN_HEADERS)]


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def find_library(wanted: str | None = None) -> Library | None:
    """The library to use, or None where there is none.

    Args:
        wanted: a name of :data:`LIBRARIES`, ``NAME==VERSION``, or a path: the package's folder, or
            one that holds it. None takes the ``deep_gemm`` that this Python imports, else vLLM's
            copy.

    Raises:
        UserError: a path that is no such library.
    """
    if wanted is None:
        return next((_described(root) for root in _installed(("deep_gemm", "vllm"))), None)
    name, _, version = wanted.partition("==")
    if name not in LIBRARIES:
        return _described(_root_below(Path(wanted)))
    found = (_described(root) for root in _installed((name,)))
    return next((library for library in found if version in ("", library.version)), None)


def _installed(names: Iterable[str]) -> Iterable[Path]:
    """Roots of the installed libraries of these names."""
    for name in names:
        package, _, below = LIBRARIES[name].partition("/")
        for folder in _package_folders(package):
            root = folder / below if below else folder
            if (root / "include" / "deep_gemm").is_dir():
                yield root


def _package_folders(package: str) -> list[Path]:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    return [Path(location) for location in spec.submodule_search_locations]


def _root_below(path: Path) -> Path:
    for root in (path, path / "deep_gemm", path / LIBRARIES["vllm"]):
        if (root / "include" / "deep_gemm").is_dir():
            return root.absolute()
    names = ", ".join(LIBRARIES)
    raise UserError(
        f"--library {path} is no DeepGEMM: it holds no include/deep_gemm; give one of {names}, or "
        "the path of a deep_gemm folder"
    )


def _described(root: Path) -> Library:
    """Name and version, from what lies in the folder and beside it."""
    version = _text(root / "VERSION")
    if version:
        return Library(root, "sgl-deep-gemm", version)
    if root.parent.name == "third_party":
        releases = sorted(root.parents[2].glob("vllm-*.dist-info"))
        if releases:
            return Library(root, "vllm", releases[-1].name.split("-")[1].removesuffix(".dist"))
    match = _VERSION.search(_text(root / "__init__.py"))
    return Library(root, "deep_gemm", match[1]) if match else Library(root, "deep_gemm")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""
