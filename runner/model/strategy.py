"""Strategies of two-batch overlap, by name or from a file.

A strategy is an order of a layer's operations, with marks between them where a batch yields. The
named strategies are SGLang's: DeepSeek decode before and after PR 6711, DeepSeek prefill, and
DeepSeek-V4 prefill, where hyper-connections replace norms and residual additions.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.backend.forward_batch import ForwardMode
from runner.errors import UserError
from runner.model.operations import Operation, Stage, cut_stages

MARK = "|"
"""Separates two stages."""

NEEDS: dict[str, tuple[str, ...]] = {
    "comm_prepare_attn": (),
    "attn_prepare": ("comm_prepare_attn",),
    "attn_core": ("attn_prepare",),
    "comm_prepare_mlp": ("attn_core",),
    "gate": ("comm_prepare_mlp",),
    "select_experts": ("gate",),
    "dispatch_a": ("select_experts",),
    "shared_experts": ("gate",),
    "dispatch_b": ("dispatch_a",),
    "experts": ("dispatch_b",),
    "combine_a": ("experts",),
    "combine_b": ("combine_a",),
    "output": ("combine_b", "shared_experts"),
    "comm_postprocess_layer": ("output",),
}
"""Operations of a layer with experts, each with the operations that must come before it."""

COMM_SMS = 20
"""SMs that SGLang's dispatcher uses by default (``DeepEPConfig.num_sms``)."""


@dataclass(frozen=True)
class OverlapStrategy:
    """An order of a layer's operations with yield marks, and how two batches run through it.

    Attributes:
        name: name in reports.
        mode: the mode of the forwards that it is for.
        steps: names of operations, with :data:`MARK` between stages.
        delta_stages: how many stages the first batch is ahead.
        comm_sms: SMs that DeepGEMM leaves to communication while two batches overlap.

    Raises:
        UserError: operations are missing, repeated, unknown or out of order, or a number is
            negative.
    """

    name: str
    mode: ForwardMode
    steps: tuple[str, ...]
    delta_stages: int = 0
    comm_sms: int = 0

    def __post_init__(self) -> None:
        for field, value in (("delta_stages", self.delta_stages), ("comm_sms", self.comm_sms)):
            if value < 0:
                raise UserError(f"strategy {self.name}: {field} = {value} must be at least 0")
        self._check_operations()

    @property
    def operations(self) -> tuple[str, ...]:
        return tuple(step for step in self.steps if step != MARK)

    def arrange(self, operations: Mapping[str, Operation]) -> list[Operation | str]:
        """A layer's operations in the strategy's order, with its marks."""
        return [step if step == MARK else operations[step] for step in self.steps]

    def check_lead(self, stages: int) -> None:
        """Raise UserError if a batch would be further ahead than there are stages."""
        if self.delta_stages > stages:
            raise UserError(
                f"strategy {self.name}: delta_stages = {self.delta_stages} must be at most "
                f"{stages}, the stages of the layers that overlap"
            )

    def describe(self) -> str:
        return ", ".join(self.steps).replace(f", {MARK}", f" {MARK}").replace(f"{MARK},", MARK)

    def to_json(self) -> dict[str, object]:
        """Plain data; :meth:`from_json` is its inverse."""
        return {
            "name": self.name,
            "mode": self.mode.value,
            "operations": " ".join(self.steps),
            "delta_stages": self.delta_stages,
            "comm_sms": self.comm_sms,
        }

    def to_toml(self) -> str:
        """The text of a file that :func:`load_strategy` reads."""
        stages = " ".join(self.steps).replace(f" {MARK} ", f"\n    {MARK} ")
        return (
            f'mode = "{self.mode.value}"\n'
            f"delta_stages = {self.delta_stages}\n"
            f"comm_sms = {self.comm_sms}\n"
            f'operations = """\n    {stages}\n"""\n'
        )

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> OverlapStrategy:
        """Rebuild a strategy.

        Raises:
            UserError: the data is not a strategy.
        """
        fields = {key: value for key, value in data.items() if key != "name"}
        return _from_fields(str(data.get("name", "unnamed")), fields)

    def _check_operations(self) -> None:
        where, order = f"strategy {self.name}", self.operations
        for index, name in enumerate(order):
            if name not in NEEDS:
                raise UserError(f"{where}: operation {name!r} is not one of {', '.join(NEEDS)}")
            if name in order[:index]:
                raise UserError(f"{where}: {name} appears twice: give each operation once")
        if missing := [name for name in NEEDS if name not in order]:
            raise UserError(f"{where}: {', '.join(missing)} missing: a layer needs every operation")
        for index, name in enumerate(order):
            for need in NEEDS[name]:
                if order.index(need) > index:
                    raise UserError(f"{where}: {name} comes before {need}, whose result it needs")


_DECODE = """
    comm_prepare_attn attn_prepare
    | attn_core comm_prepare_mlp gate select_experts
    | dispatch_a shared_experts
    | dispatch_b experts combine_a
    | combine_b
"""
_PREFILL = """
    comm_prepare_attn attn_prepare attn_core comm_prepare_mlp gate select_experts dispatch_a
    | dispatch_b experts combine_a
    | shared_experts combine_b output comm_postprocess_layer
"""
_DECODE_BEFORE = f"{_DECODE} output comm_postprocess_layer |".split()
_DECODE_NOW = f"{_DECODE} | output comm_postprocess_layer".split()

STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        OverlapStrategy("deepseek-decode-before", ForwardMode.DECODE, tuple(_DECODE_BEFORE), 2),
        OverlapStrategy("deepseek-decode", ForwardMode.DECODE, tuple(_DECODE_NOW), 2),
        OverlapStrategy(
            "deepseek-prefill", ForwardMode.EXTEND, tuple(_PREFILL.split()), 0, COMM_SMS
        ),
        OverlapStrategy("dsv4-prefill", ForwardMode.EXTEND, tuple(_PREFILL.split()), 0),
    )
}
"""Strategies by name."""

PLAIN = {
    ForwardMode.DECODE: STRATEGIES["deepseek-decode"],
    ForwardMode.EXTEND: STRATEGIES["dsv4-prefill"],
}
"""The order in which a layer runs when no batches overlap."""


def load_strategy(name_or_path: str) -> OverlapStrategy:
    """A strategy by name, or from a TOML file.

    The file has ``mode`` ("decode" or "extend"), ``operations`` (a string of names with ``|``
    between stages), and optionally ``delta_stages`` and ``comm_sms`` (default 0).

    Raises:
        UserError: neither a strategy's name nor a readable file with a valid strategy.
    """
    if name_or_path in STRATEGIES:
        return STRATEGIES[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"overlap strategy {name_or_path!r} is not known: use one of "
            f"{', '.join(STRATEGIES)}, or a file"
        )
    try:
        return _from_fields(path.stem, tomllib.loads(path.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read the overlap strategy {path}: {error}") from None


def load_strategies(names: Sequence[str]) -> tuple[OverlapStrategy, ...]:
    """The strategies of ``--overlap``.

    Raises:
        UserError: a strategy is not known, or two are for the same mode.
    """
    found: dict[ForwardMode, OverlapStrategy] = {}
    for strategy in map(load_strategy, names):
        if strategy.mode in found:
            raise UserError(
                f"--overlap {found[strategy.mode].name} and {strategy.name} are both for "
                f"{strategy.mode.name}: give one of them"
            )
        found[strategy.mode] = strategy
    return tuple(found.values())


_FIELDS: dict[str, type] = {"mode": str, "operations": str, "delta_stages": int, "comm_sms": int}


def _from_fields(name: str, data: Mapping[str, object]) -> OverlapStrategy:
    for key, value in data.items():
        if key not in _FIELDS:
            raise UserError(f"strategy {name}: {key!r} is not known: use {', '.join(_FIELDS)}")
        if type(value) is not _FIELDS[key]:
            raise UserError(f"strategy {name}: {key} = {value!r} must be a {_FIELDS[key].__name__}")
    for key in ("mode", "operations"):
        if key not in data:
            raise UserError(f"strategy {name}: {key!r} is missing")
    modes = {mode.value: mode for mode in ForwardMode}
    mode = str(data["mode"])
    if mode not in modes:
        raise UserError(f"strategy {name}: mode {mode!r} must be {' or '.join(modes)}")
    steps = str(data["operations"]).replace(MARK, f" {MARK} ").replace(",", " ").split()
    counts = {key: value for key, value in data.items() if isinstance(value, int)}
    return OverlapStrategy(name, modes[mode], tuple(steps), **counts)


def concatenate(
    strategy: OverlapStrategy, layers: Sequence[Mapping[str, Operation]]
) -> list[Stage]:
    """Stages of consecutive layers; a stage may continue from one layer into the next."""
    stages = cut_stages(step for layer in layers for step in strategy.arrange(layer))
    strategy.check_lead(len(stages))
    return stages
