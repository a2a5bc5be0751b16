"""Cache keys: the names under which a library looks for its kernels, in both JIT generations.

A key is a digest of the compiler, the flags, and the source with its included headers. In the first
generation, the flags contain the include path, and the compiler is only ``NVCC<release>``. In the
second, keys contain no path, and the compiler is the whole text of ``nvcc --version``. Keys can be
made for other machines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from runner.config.environ import Environ
from runner.kernels.digest import DeepJitDigest, Digest
from runner.kernels.entry import CUBIN, SOURCE
from runner.kernels.installed import Headers, include_hash, own_headers
from runner.kernels.kernel import Kernel

_ARCH = re.compile(r"\bsm_\w+")

INCLUDE = "{include}"
"""Stands for the include path in a recipe's flags."""


@dataclass(frozen=True)
class Recipe:
    """How a library compiles its kernels on one GPU.

    Attributes:
        flags: nvcc's flags in order, with :data:`INCLUDE` in place of the include path.
        extra_signature: additional text in the digest of second-generation keys.
        options: the library's own description of the flags, as JSON; entries contain it.
    """

    generation: int
    flags: tuple[str, ...]
    extra_signature: str = ""
    options: str = ""

    @property
    def arch(self) -> str:
        """nvcc's name of the target, such as ``sm_100f``; empty if the flags have none."""
        found = _ARCH.search(" ".join(self.flags))
        return found[0] if found else ""

    def arguments(self, include_path: Path) -> list[str]:
        """nvcc's arguments besides source and output."""
        return [flag.replace(INCLUDE, str(include_path)) for flag in self.flags]


_REGISTERS = "--ptxas-options=--register-usage-level="
_STANDARD = "-std=c++"
FIRST_RECIPE = Recipe(
    1,
    (
        f"{_STANDARD}20",
        "--diag-suppress=39,161,174,177,186,940",
        f"{_REGISTERS}10",
        f"-I{INCLUDE}",
        "--gpu-architecture=sm_90a",
        "--compiler-options=-fPIC,-O3,-fconcepts,-Wno-deprecated-declarations,-Wno-abi",
        "-O3",
        "--expt-relaxed-constexpr",
        "--expt-extended-lambda",
    ),
)
_FIRST_VERBOSE = "--ptxas-options=--verbose,--warn-on-local-memory-usage"
_FIRST_LINES = ("-Xcompiler", "-rdynamic", "-lineinfo")
_VERBOSE = "--ptxas-options=--verbose"
_SPILLS = "--ptxas-options=--warn-on-spills"
_LOCAL_MEMORY = "--ptxas-options=--warn-on-local-memory-usage"
_LINES = "--generate-line-info"
_BY_VARIABLES = {_VERBOSE, _SPILLS, _LOCAL_MEMORY, _LINES, _FIRST_VERBOSE, *_FIRST_LINES}


def first_recipe(environ: Environ) -> Recipe:
    """The recipe of the first generation on SM90."""
    return with_variables(FIRST_RECIPE, environ)


def with_variables(recipe: Recipe, environ: Environ) -> Recipe:
    """The recipe after the changes that a machine's ``DG_JIT_*`` variables make.

    Sources: csrc/jit/compiler.hpp of sgl-deep-gemm 0.1.4.post1; ``CompilerOptions`` of
    deep_jit/backend/cuda/options.hpp in 0.2.3.post2.
    """
    verbose = environ.dg_jit_debug or environ.dg_jit_ptxas_verbose
    if recipe.generation == 1:
        before: list[str] = []
        after = [_FIRST_VERBOSE] if verbose or environ.dg_jit_ptxas_check else []
        after += _FIRST_LINES if environ.dg_jit_with_lineinfo else ()
    else:
        before = [_VERBOSE] if verbose else []
        after = [_SPILLS] if environ.dg_jit_check_no_spills else []
        after += [_LOCAL_MEMORY] if environ.dg_jit_check_no_local_memory else []
        after += [_LINES] if environ.dg_jit_debug or environ.dg_jit_with_lineinfo else []
    flags: list[str] = []
    for flag in recipe.flags:
        if flag.startswith(_REGISTERS):
            flags += [*before, flag, *after]
        elif flag.startswith(_STANDARD):
            flags.append(f"{_STANDARD}{environ.dg_jit_cpp_standard}")
        elif flag not in _BY_VARIABLES:
            flags.append(flag)
    return replace(recipe, flags=tuple(flags))


@dataclass(frozen=True)
class CacheKeys:
    """Makes sources and keys for one machine, like the recipe's JIT generation.

    Attributes:
        signature: identifies the compiler of the machine that will run; see
            :func:`runner.kernels.nvcc.signature_of`.
        include_path: the include folder on that machine; only first-generation keys contain it.
    """

    headers: Headers
    recipe: Recipe
    signature: str
    include_path: Path

    @cached_property
    def flags(self) -> str:
        """The compiler's flags in the form that keys contain."""
        flags = self.recipe.flags
        if self.recipe.generation == 1:
            return " ".join(self.recipe.arguments(self.include_path))
        return " ".join(flag for flag in flags if flag not in ("--include-path", INCLUDE))

    def source(self, kernel: Kernel) -> str:
        """The generated source of a kernel, byte for byte as the library generates it."""
        body = kernel.body
        if self.recipe.generation == 1:
            return f"// Includes' hash value: {include_hash(self.headers, body)}\n{body}"
        return body

    def cache_key(self, kernel: Kernel) -> str:
        return self.key_of(kernel.name, self.source(kernel))

    def key_of(self, name: str, source: str) -> str:
        """The cache key of a generated source, which is the name of the entry's folder.

        Raises:
            OSError: the library does not have a header that the source includes.
        """
        if self.recipe.generation == 1:
            if name not in self._prefixes:
                self._prefixes[name] = Digest().update(f"{name}$${self.signature}$${self.flags}$$")
            return f"kernel.{name}.{self._prefixes[name].update(source).hex}"
        digest = DeepJitDigest().update(source)
        for header in own_headers(source):
            digest = digest.update(self.headers.header_hash(header))
        return f"{name}.{self._second_prefix.update(digest.hex).hex}"

    @cached_property
    def _prefixes(self) -> dict[str, Digest]:
        """First generation: digest of everything before the source, by kernel name."""
        return {}

    @cached_property
    def _second_prefix(self) -> DeepJitDigest:
        """Second generation: digest of signatures, flags and an empty post-hook."""
        compiler = DeepJitDigest().update(self.signature).hex
        prefix = DeepJitDigest().update(self.recipe.extra_signature).update(compiler)
        return prefix.update(self.flags).update("")

    @cached_property
    def extra_files(self) -> Mapping[str, bytes]:
        """The files of an entry besides source and cubin.

        In the second generation these are ``.committed`` and ``meta.json``, which the library
        writes for people and never reads.
        """
        if self.recipe.generation == 1:
            return {}
        recipe = {
            "command": f"nvcc {SOURCE} --cubin --output-file {CUBIN} {self.flags}",
            "config": {"extra_signature": self.recipe.extra_signature},
            "compiler_info": {"version": self.signature},
            "compiler_options": json.loads(self.recipe.options or "{}"),
        }
        return {"meta.json": json.dumps(recipe).encode(), ".committed": b""}
