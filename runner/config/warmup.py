"""Warm-up policies by name, and the part of a prefill/decode split that a server is."""

from __future__ import annotations

from enum import Enum


class DisaggregationMode(Enum):
    """Which part of a prefill/decode split the server is; NONE serves both."""

    NONE = "none"
    PREFILL = "prefill"
    DECODE = "decode"


class WarmupPolicy(Enum):
    """What a rank does before it serves; docs/policies.md explains each."""

    NONE = "none"
    FULL = "full"
    FAST = "fast"
    PP_PARALLEL = "pp-parallel"
    PP_PARALLEL_FULL = "pp-parallel+full"
    PP_PARALLEL_FAST = "pp-parallel+fast"
    RELAX = "relax"
    PLANNED = "planned"
    PREBUILT = "prebuilt"

    @property
    def walked(self) -> str:
        """The M list that the execution hook walks: ``full``, ``fast``, or empty for none."""
        last = self.value.rpartition("+")[2]
        return last if last in ("full", "fast") else ""

    @property
    def runs_dummies(self) -> bool:
        """Whether each stage runs dummy batches of its own before it serves."""
        return self.value.startswith("pp-parallel")

    @property
    def plans(self) -> bool:
        """Whether the policy prepares every kernel of the plan."""
        return self in (WarmupPolicy.PLANNED, WarmupPolicy.PREBUILT)


def policy_of_flags(
    *, precompile: bool | None, fast: bool | None, pp_parallel: bool | None
) -> WarmupPolicy | None:
    """The policy that SGLang's variables ask for; None where none of them is set.

    Unset ones have upstream's defaults: precompile on, fast and pp-parallel off.
    """
    if precompile is fast is pp_parallel is None:
        return None
    walked = "" if precompile is False else "fast" if fast else "full"
    words = ["pp-parallel"] * bool(pp_parallel) + [walked] * bool(walked)
    return WarmupPolicy("+".join(words) or "none")
