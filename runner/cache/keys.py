"""Cache keys: under which name a machine's library looks for a kernel, for both JIT generations.

A key digests the compiler, its flags and the source with the headers that it includes. The first
generation has the include path among the flags and shortens the compiler to ``NVCC<release>``; the
second has no path in its keys, and the whole text of ``nvcc --version``. Keys can be made for
another machine than this one.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from runner.cache.digest import DeepJitDigest, Digest
from runner.cache.entry import CUBIN, SOURCE
from runner.config.environ import Environ
from runner.kernels.installed import Headers, include_hash, own_headers
from runner.kernels.kernel import HASH_LINE, Kernel

_ARCH = re.compile(r"\bsm_\w+")

INCLUDE = "{include}"
"""Stands for the include path in a recipe's flags."""


@dataclass(frozen=True)
class Recipe:
    """How a library compiles its kernels on one GPU.

    Attributes:
        generation: of its JIT.
        flags: nvcc's flags in order; :data:`INCLUDE` stands where the include path goes.
        extra_signature: what else the second generation's keys digest.
        options: the library's own account of the flags, which its entries keep, as JSON.
    """

    generation: int
    flags: tuple[str, ...]
    extra_signature: str = ""
    options: str = ""

    @property
    def arch(self) -> str:
        """nvcc's name of the target, such as ``sm_100f``."""
        found = _ARCH.search(" ".join(self.flags))
        return found[0] if found else ""

    def arguments(self, include_path: Path) -> list[str]:
        """nvcc's arguments besides source and output."""
        return [flag.replace(INCLUDE, str(include_path)) for flag in self.flags]


_FIRST = Recipe(
    1,
    (
        "-std=c++20",
        "--diag-suppress=39,161,174,177,186,940",
        "--ptxas-options=--register-usage-level=10",
        f"-I{INCLUDE}",
        "--gpu-architecture=sm_90a",
        "--compiler-options=-fPIC,-O3,-fconcepts,-Wno-deprecated-declarations,-Wno-abi",
        "-O3",
        "--expt-relaxed-constexpr",
        "--expt-extended-lambda",
    ),
)


def first_recipe(environ: Environ) -> Recipe:
    """The recipe of the first generation on SM90 (csrc/jit/compiler.hpp of 0.1.4.post1)."""
    return with_variables(_FIRST, environ)


_FIRST_VERBOSE = "--ptxas-options=--verbose,--warn-on-local-memory-usage"
_FIRST_LINES = ("-Xcompiler", "-rdynamic", "-lineinfo")
_VERBOSE = "--ptxas-options=--verbose"
_REGISTERS = "--ptxas-options=--register-usage-level="
_SPILLS = "--ptxas-options=--warn-on-spills"
_LOCAL = "--ptxas-options=--warn-on-local-memory-usage"
_LINES = "--generate-line-info"
_STANDARD = "-std=c++"


def with_variables(recipe: Recipe, environ: Environ) -> Recipe:
    """A recipe as the ``DG_JIT_*`` variables of a machine change it.

    Sources: csrc/jit/compiler.hpp of sgl-deep-gemm 0.1.4.post1; ``CompilerOptions`` of
    deep_jit/backend/cuda/options.hpp in 0.2.3.post2.
    """
    before, after = _first_flags(environ) if recipe.generation == 1 else _second_flags(environ)
    optional = {_VERBOSE, _SPILLS, _LOCAL, _LINES, _FIRST_VERBOSE, *_FIRST_LINES}
    flags: list[str] = []
    for flag in recipe.flags:
        if flag.startswith(_REGISTERS):
            flags += [*before, flag, *after]
        elif flag.startswith(_STANDARD):
            flags.append(f"{_STANDARD}{environ.dg_jit_cpp_standard}")
        elif flag not in optional:
            flags.append(flag)
    return replace(recipe, flags=tuple(flags))


def _first_flags(environ: Environ) -> tuple[list[str], list[str]]:
    """What the variables put before and after the flag of register usage."""
    verbose = environ.dg_jit_debug or environ.dg_jit_ptxas_verbose or environ.dg_jit_ptxas_check
    lines = _FIRST_LINES if environ.dg_jit_with_lineinfo else ()
    return [], [*[_FIRST_VERBOSE] * bool(verbose), *lines]


def _second_flags(environ: Environ) -> tuple[list[str], list[str]]:
    verbose = environ.dg_jit_debug or environ.dg_jit_ptxas_verbose
    after = {
        _SPILLS: environ.dg_jit_check_no_spills,
        _LOCAL: environ.dg_jit_check_no_local_memory,
        _LINES: environ.dg_jit_debug or environ.dg_jit_with_lineinfo,
    }
    return [_VERBOSE] * bool(verbose), [name for name, is_set in after.items() if is_set]


class CacheKeys(ABC):
    """Makes sources and keys for one machine.

    Attributes:
        headers: the library's headers.
        recipe: how it compiles.
        signature: what the keys hold of the compiler.
    """

    headers: Headers
    recipe: Recipe
    signature: str

    @property
    @abstractmethod
    def flags(self) -> str:
        """The compiler's flags as the keys hold them."""

    @abstractmethod
    def source(self, kernel: Kernel) -> str:
        """The generated source of a kernel, byte for byte what the library generates."""

    @abstractmethod
    def key_of(self, name: str, source: str) -> str:
        """Cache key of a generated source: the name of its folder."""

    def cache_key(self, kernel: Kernel) -> str:
        """Name of the kernel's folder in the cache."""
        return self.key_of(kernel.name, self.source(kernel))

    @property
    def extra_files(self) -> Mapping[str, bytes]:
        """What an entry holds besides source and cubin."""
        return {}


@dataclass(frozen=True)
class FirstKeys(CacheKeys):
    """Keys of the first generation: ``kernel.<name>.<hex>``.

    Attributes:
        include_path: the include folder on the machine that will run.
        signature: ``NVCC<major>.<minor>`` of that machine's compiler.
    """

    headers: Headers
    recipe: Recipe
    signature: str
    include_path: Path

    @cached_property
    def flags(self) -> str:
        """All flags, the include path among them."""
        return " ".join(self.recipe.arguments(self.include_path))

    def source(self, kernel: Kernel) -> str:
        """The body after a line with the digest of the headers."""
        body = kernel.body
        return f"// Includes' hash value: {include_hash(self.headers, body)}\n{body}"

    def key_of(self, name: str, source: str) -> str:
        """Digest of name, signature, flags and source."""
        return f"kernel.{name}.{self._prefix(name).update(source).hex}"

    @cached_property
    def _prefixes(self) -> dict[str, Digest]:
        return {}

    def _prefix(self, name: str) -> Digest:
        """Digest of all that comes before the source: the same for all kernels of a name."""
        if name not in self._prefixes:
            self._prefixes[name] = Digest().update(f"{name}$${self.signature}$${self.flags}$$")
        return self._prefixes[name]


@dataclass(frozen=True)
class SecondKeys(CacheKeys):
    """Keys of the second generation, DeepJIT: ``<name>.<hex>``.

    Attributes:
        signature: all that ``nvcc --version`` prints on the machine that will run.
    """

    headers: Headers
    recipe: Recipe
    signature: str

    @cached_property
    def flags(self) -> str:
        """The flags but for the include path, which is no part of these keys."""
        return " ".join(flag for flag in self.recipe.flags if flag not in _INCLUDE_OPTION)

    def source(self, kernel: Kernel) -> str:
        """The body alone."""
        return kernel.body

    def key_of(self, name: str, source: str) -> str:
        """Digest of signatures, flags, an empty post-hook, and the source with its headers."""
        return f"{name}.{self._prefix.update(self._source_hash(source)).hex}"

    @cached_property
    def extra_files(self) -> Mapping[str, bytes]:
        """The recipe, for people: the library writes it and never reads it; and its mark."""
        recipe = {
            "command": f"nvcc {SOURCE} --cubin --output-file {CUBIN} {self.flags}",
            "config": {"extra_signature": self.recipe.extra_signature},
            "compiler_info": {"version": self.signature},
            "compiler_options": json.loads(self.recipe.options or "{}"),
        }
        return {"meta.json": json.dumps(recipe).encode(), ".committed": b""}

    @cached_property
    def _prefix(self) -> DeepJitDigest:
        compiler = DeepJitDigest().update(self.signature).hex
        prefix = DeepJitDigest().update(self.recipe.extra_signature).update(compiler)
        return prefix.update(self.flags).update("")

    def _source_hash(self, source: str) -> str:
        digest = DeepJitDigest().update(source)
        for header in own_headers(source):
            digest = digest.update(self.headers.header_hash(header))
        return digest.hex


_INCLUDE_OPTION = ("--include-path", INCLUDE)


def body_of(source: str) -> str:
    """A generated source without the line of the first generation that has the headers' digest."""
    match = HASH_LINE.match(source)
    return source[match.end() :] if match else source
