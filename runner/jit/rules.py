"""Which library versions and architectures are known, behind one value each.

A new version is a module of its own with the same two functions, and a line in ``KNOWN_RULES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runner.errors import UserError
from runner.jit.kernel_type import DeepGemmKernelType, KernelCall
from runner.jit.kernels import Kernel, kernels_of, m_class_starts


@dataclass(frozen=True)
class JitRules:
    """What one version of the library builds on one architecture.

    Attributes:
        library_version: version of ``sgl-deep-gemm``.
        arch: nvcc's name of the architecture.
        kernels_of: kernels of a call.
        m_class_starts: (type, last M) -> first M of every class of M that runs the same kernels.
    """

    library_version: str
    arch: str
    kernels_of: Callable[[KernelCall], tuple[Kernel, ...]]
    m_class_starts: Callable[[DeepGemmKernelType, int], list[int]]


KNOWN_RULES = (JitRules("0.1.4.post1", "sm_90a", kernels_of, m_class_starts),)


def rules_for(library_version: str, arch: str = "sm_90a") -> JitRules:
    """The rules of a version on an architecture.

    Raises:
        UserError: nobody has written them down yet.
    """
    for rules in KNOWN_RULES:
        if (rules.library_version, rules.arch) == (library_version, arch):
            return rules
    known = ", ".join(f"sgl-deep-gemm=={r.library_version} on {r.arch}" for r in KNOWN_RULES)
    raise UserError(
        f"deep_gemm {library_version} on {arch} is not known: the rules of {known} are; install "
        "that version, or let the library itself tell (runner plan --source library, on a GPU)"
    )
