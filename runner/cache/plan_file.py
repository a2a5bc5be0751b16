"""A plan read back from ``runner plan --json``: which keys, and which M a kernel serves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.cache.describe import Config
from runner.cache.manifest import Manifest, check_uses
from runner.errors import UserError

_SHOWN = 3


@dataclass(frozen=True)
class PlanFile:
    """What tools need of a plan.

    Attributes:
        title: what was planned.
        kernels: the plan's items.
        target: what the keys are for, as a manifest without entries; None where there are none.
    """

    title: str
    kernels: list[dict[str, Any]]
    target: Manifest | None

    @property
    def keys(self) -> list[str]:
        """Cache keys, in the plan's order.

        Raises:
            UserError: the plan was made without the library's headers.
        """
        keys = [item["cache_key"] for item in self.kernels]
        if None in keys:
            raise UserError(
                "the plan has no cache keys: make it where deep_gemm's headers are installed"
            )
        return keys

    def uses_of(self, name: str, config: Config) -> list[dict[str, Any]]:
        """GEMMs that run a kernel; empty where it is not planned."""
        for item in self.kernels:
            if item["name"] == name and item["config"] == config:
                uses: list[dict[str, Any]] = item["uses"]
                return uses
        return []


def read_plan_file(path: Path) -> PlanFile:
    """Read the JSON of ``runner plan``.

    Raises:
        UserError: not such a file.
    """
    try:
        data = json.loads(path.read_text())
        kernels = [
            {name: item[name] for name in ("name", "cache_key", "config", "uses")}
            for item in data["kernels"]
        ]
        for item in kernels:
            check_uses(item["uses"])
        return PlanFile(data["for"], kernels, _target(data))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a plan of runner plan --json: {error!r}") from None


def _target(data: dict[str, Any]) -> Manifest | None:
    if data.get("signature") is None or data.get("flags") is None:
        return None
    return Manifest(
        library=data["library"],
        arch=data["arch"],
        signature=data["signature"],
        flags=data["flags"],
        generation=data.get("generation", 1),
        extra_signature=data.get("extra_signature", ""),
        built_with=data["signature"],
    )


def uses_in_words(uses: Sequence[dict[str, Any]]) -> str:
    """``gemm_nt_f8f8bf16:4096:1024 M 1..16; ...``, a few of them."""
    words = [_use_in_words(use) for use in uses[:_SHOWN]]
    more = len(uses) - _SHOWN
    noun = "GEMM" if more == 1 else "GEMMs"
    return "; ".join([*words, f"and {more} more {noun}"] if more > 0 else words)


def _use_in_words(use: dict[str, Any]) -> str:
    groups = f":{use['num_groups']}" if use["num_groups"] > 1 else ""
    pairs = [f"{a}" if a == b else f"{a}..{b}" for a, b in use["m_ranges"]]
    shown = pairs if len(pairs) <= _SHOWN else [*pairs[:_SHOWN], "..."]
    return f"{use['type']}:{use['n']}:{use['k']}{groups} M {', '.join(shown)}"
