"""Warm-up policies, and a server's role in a prefill/decode split."""

from __future__ import annotations

from enum import Enum


class DisaggregationMode(Enum):
    """The server's role in a prefill/decode split; NONE serves both."""

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
        """Whether each stage runs its own dummy batches before it serves."""
        return self.value.startswith("pp-parallel")

    @property
    def plans(self) -> bool:
        """Whether the policy prepares every kernel of the plan."""
        return self in (WarmupPolicy.PLANNED, WarmupPolicy.PREBUILT)


def policy_of_flags(
    *, precompile: bool | None, fast: bool | None, pp_parallel: bool | None
) -> WarmupPolicy | None:
    """The policy that SGLang's variables ask for; None if none of them is set.

    If some are set, the others have upstream's defaults: precompile on, fast and pp-parallel off.
    """
    if precompile is fast is pp_parallel is None:
        return None
    walked = "" if precompile is False else "fast" if fast else "full"
    words = ["pp-parallel"] * bool(pp_parallel) + [walked] * bool(walked)
    return WarmupPolicy("+".join(words) or "none")
