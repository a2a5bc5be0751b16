"""One JIT kernel as a value: its name and its generated source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from runner.kernels.digest import hex_digest

HASH_LINE = re.compile(r"// Includes' hash value: ([0-9a-f]{32})\n")
"""First line of a source in the first JIT generation; the kernel's body follows it."""

_BODY = re.compile(
    r"\n#include <([^>\n]+)>\n\nusing namespace deep_gemm;\n\n"
    r"(.*?)static void __instantiate_kernel\(\) \{\n"
    r"    auto ptr = reinterpret_cast<void\*>\(&([\w:]+)<\n(.*?)\n    >\);\n\};\n",
    re.DOTALL,
)
_INDENT = "\n        "


@dataclass(frozen=True, slots=True)
class Kernel:
    """What distinguishes one kernel from all others, without include paths or hashes.

    Attributes:
        name: the library's kernel name.
        header: the included header, relative to the include folder.
        entry: the instantiated template.
        arguments: the lines of template arguments.
        prelude: text between the include and the instantiation, such as a ``static_assert``;
            usually empty. If the source has any other form, this is the whole source, and
            ``header``, ``entry`` and ``arguments`` are empty.
    """

    name: str
    header: str
    entry: str
    arguments: tuple[str, ...]
    prelude: str = ""

    @classmethod
    def of_source(cls, name: str, source: str) -> Kernel:
        """The kernel with that name and generated source (text of ``kernel.cu``)."""
        body = body_of(source)
        whole = cls(name, "", "", (), body)
        parts = _BODY.fullmatch(body)
        if parts is None:
            return whole
        header, prelude, entry, arguments = parts.groups()
        lines = arguments.removeprefix(_INDENT[1:]).split("," + _INDENT)
        kernel = cls(name, header, entry, tuple(lines), prelude)
        return kernel if kernel.body == body else whole

    @property
    def identity(self) -> str:
        """A short text for Timelines, which is equal for equal kernels."""
        return _identity(self)

    @property
    def body(self) -> str:
        """The generated source without the line that has the headers' hash."""
        if not self.entry:
            return self.prelude
        lines = ("," + _INDENT).join(self.arguments)
        return (
            f"\n#include <{self.header}>\n\nusing namespace deep_gemm;\n\n{self.prelude}"
            "static void __instantiate_kernel() {\n"
            f"    auto ptr = reinterpret_cast<void*>(&{self.entry}<{_INDENT}"
            f"{lines}\n    >);\n}};\n"
        )


@lru_cache(maxsize=65536)
def _identity(kernel: Kernel) -> str:
    return identity_of(kernel.name, kernel.body)


def body_of(source: str) -> str:
    """A generated source without the line that has the headers' hash (first generation)."""
    match = HASH_LINE.match(source)
    return source[match.end() :] if match else source


def identity_of(name: str, body: str) -> str:
    """Identity of the kernel with that name and body; see :func:`body_of`."""
    return f"{name} {hex_digest(body)[:16]}"
