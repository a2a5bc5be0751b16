"""The installed DeepGEMM: found without importing it, because importing needs a CUDA torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from runner.jit.digest import hex_digest
from runner.jit.rules import rules_for

_INCLUDE = re.compile(r"#\s*include\s*[<\"]([^>\"]+)[>\"]")


@dataclass
class Library:
    """Root folder of an installed ``deep_gemm`` package (the folder that holds ``include/``)."""

    root: Path
    _hashes: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def include_path(self) -> Path:
        """Folder given to the compiler with ``-I``; part of every cache key."""
        return self.root / "include"

    def header_hash(self, header: str) -> str:
        """Digest over ``header`` and the ``deep_gemm`` headers it includes, recursively.

        Args:
            header: path below the include folder, such as ``deep_gemm/impls/smxx_layout.cuh``.
        """
        if header not in self._hashes:
            text = (self.include_path / header).read_text()
            self._hashes[header] = hex_digest(f"{self._children(text)}#{hex_digest(text)}")
        return self._hashes[header]

    def include_hash(self, code: str) -> str:
        """Digest over the headers of a generated source, not over the source itself."""
        return hex_digest(self._children(code))

    def _children(self, text: str) -> str:
        headers = [name for name in _INCLUDE.findall(text) if name.startswith("deep_gemm")]
        return "".join(f"{self.header_hash(name)}$" for name in headers)


def find_library() -> Library | None:
    """The ``deep_gemm`` of this Python environment, or None where there is none.

    Raises:
        UserError: an installed version whose kernels this project does not know.
    """
    spec = find_spec("deep_gemm")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    if not (root / "include" / "deep_gemm").is_dir():
        return None
    rules_for(_read_version(root))
    return Library(root)


def _read_version(root: Path) -> str:
    path = root / "VERSION"
    return path.read_text().strip() if path.is_file() else "of unknown version"
