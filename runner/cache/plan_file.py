"""A plan read back from ``runner plan --json``: its keys, and the M that each kernel serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.cache.manifest import Manifest, Use, check_uses
from runner.errors import UserError
from runner.files import parse_json
from runner.kernels.call_template import CallShape
from runner.kernels.describe import Config

_SHOWN = 3


@dataclass(frozen=True)
class PlannedEntry:
    """One kernel of a plan; without the library's headers it has no key."""

    name: str
    cache_key: str | None
    config: Config
    uses: list[Use]


@dataclass(frozen=True)
class PlanFile:
    """What tools need of a plan; ``target`` is the machine of its keys, None without keys."""

    title: str
    kernels: list[PlannedEntry]
    target: Manifest | None

    @property
    def keys(self) -> list[str]:
        """Cache keys, in the plan's order.

        Raises:
            UserError: the plan was made without the library's headers.
        """
        keys = [item.cache_key for item in self.kernels if item.cache_key is not None]
        if len(keys) < len(self.kernels):
            raise UserError(
                "the plan has no cache keys: make it where deep_gemm's headers are installed"
            )
        return keys

    def uses_of(self, name: str, config: Config) -> list[Use]:
        """GEMMs that run a kernel; empty if it is not planned."""
        found = (item.uses for item in self.kernels if (item.name, item.config) == (name, config))
        return next(found, [])


def read_plan_file(path: Path) -> PlanFile:
    """Read the JSON of ``runner plan``.

    Raises:
        UserError: the file is unreadable or not a plan.
    """
    try:
        data = parse_json(path.read_text())
        if data["version"] != 1:
            raise ValueError(f"its version {data['version']!r} is not 1")
        kernels = [
            PlannedEntry(item["name"], item["cache_key"], item["config"], item["uses"])
            for item in data["kernels"]
        ]
        for item in kernels:
            check_uses(item.uses)
        target = None
        if data.get("signature") and data.get("flags"):
            names = ("library", "arch", "signature", "flags", "generation", "extra_signature")
            known = {name: data[name] for name in names if name in data}
            target = Manifest(**known, built_with=data["signature"])
        return PlanFile(data["for"], kernels, target)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a plan from runner plan --json: {error!r}") from None


def _name_of(use: Use) -> str:
    if "call" in use:
        return CallShape(use["call"], use["num_sms"]).describe()
    groups = f":{use['num_groups']}" if use["num_groups"] > 1 else ""
    return f"{use['type']}:{use['n']}:{use['k']}{groups}"


def uses_in_words(uses: Sequence[Use]) -> str:
    """The first few uses, as ``gemm_nt_f8f8bf16:4096:1024 M 1..16; ...``."""
    words = []
    for use in uses[:_SHOWN]:
        pairs = [f"{a}" if a == b else f"{a}..{b}" for a, b in use["m_ranges"]]
        shown = pairs if len(pairs) <= _SHOWN else [*pairs[:_SHOWN], "..."]
        words.append(f"{_name_of(use)} M {', '.join(shown)}")
    more = len(uses) - _SHOWN
    if more > 0:
        words.append(f"and {more} more {'GEMM' if more == 1 else 'GEMMs'}")
    return "; ".join(words)
