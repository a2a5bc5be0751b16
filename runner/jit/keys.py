"""Cache keys: under which name a machine's library looks for a kernel.

A key digests the kernel's name, the compiler's signature, the compiler's flags and the source. The
flags hold the include path of the machine that will run, so keys can be made for another machine
than this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from runner.environ import Environ
from runner.jit.digest import Digest
from runner.jit.kernels import Kernel
from runner.jit.library import Library

ARCH = "90a"
"""Target of every kernel: SM90 with its architecture-specific instructions."""


def nvcc_flags(include_path: Path, environ: Environ) -> str:
    """Flags as one string, as DeepGEMM puts them; the string itself is part of the key."""
    flags = (
        f"-std=c++{environ.dg_jit_cpp_standard} --diag-suppress=39,161,174,177,186,940 "
        "--ptxas-options=--register-usage-level=10"
    )
    if environ.dg_jit_debug or environ.dg_jit_ptxas_verbose or environ.dg_jit_ptxas_check:
        flags += " --ptxas-options=--verbose,--warn-on-local-memory-usage"
    if environ.dg_jit_with_lineinfo:
        flags += " -Xcompiler -rdynamic -lineinfo"
    return (
        f"{flags} -I{include_path} --gpu-architecture=sm_{ARCH} "
        "--compiler-options=-fPIC,-O3,-fconcepts,-Wno-deprecated-declarations,-Wno-abi "
        "-O3 --expt-relaxed-constexpr --expt-extended-lambda"
    )


@dataclass(frozen=True)
class CacheKeys:
    """Makes sources and keys.

    Attributes:
        library: the headers, on this machine.
        include_path: the include folder on the machine that will run.
        signature: ``NVCC<major>.<minor>`` of that machine's compiler.
        environ: the variables that change flags.
    """

    library: Library
    include_path: Path
    signature: str
    environ: Environ

    @cached_property
    def flags(self) -> str:
        """See :func:`nvcc_flags`."""
        return nvcc_flags(self.include_path, self.environ)

    def source(self, kernel: Kernel) -> str:
        """The generated source of a kernel, byte for byte what the library generates."""
        body = kernel.body
        return f"// Includes' hash value: {self.library.include_hash(body)}\n{body}"

    def cache_key(self, kernel: Kernel) -> str:
        """Name of the kernel's directory in the cache: ``kernel.<name>.<hex>``."""
        return self.key_of(kernel.name, self.source(kernel))

    def key_of(self, name: str, source: str) -> str:
        """Cache key of a generated source, headers' hash line included."""
        return f"kernel.{name}.{self._prefix(name).hex_with(source)}"

    @cached_property
    def _prefixes(self) -> dict[str, Digest]:
        return {}

    def _prefix(self, name: str) -> Digest:
        """Digest of all that comes before the source: the same for all kernels of a name."""
        if name not in self._prefixes:
            self._prefixes[name] = Digest().update(f"{name}$${self.signature}$${self.flags}$$")
        return self._prefixes[name]
