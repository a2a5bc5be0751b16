"""Where a layer's operation list yields: strategies of two-batch overlap, by name or from a file.

A strategy is the order of a layer's operations with marks between them. Those with a name are
SGLang's: its DeepSeek decode placement before and after PR 6711, its DeepSeek prefill placement
and that of DeepSeek-V4, whose hyper-connections take the place of norms and residual additions.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.backend.forward_batch import ForwardMode
from runner.errors import UserError
from runner.model.operations import Operation, Stage, Step, YieldOperation, cut_stages

MARK = "|"

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
"""Operations of a layer with experts, and which of them each comes after."""

COMM_SMS = 20
"""SMs that SGLang's dispatcher takes by default (``DeepEPConfig.num_sms``)."""


@dataclass(frozen=True)
class OverlapStrategy:
    """An order of a layer's operations with yield marks, and how two batches run through it.

    Attributes:
        name: for reports.
        mode: forwards that it is for.
        steps: names of operations, :data:`MARK` between stages.
        delta_stages: how many stages the first batch is ahead.
        comm_sms: SMs that DeepGEMM leaves to communication while two batches overlap.

    Raises:
        UserError: operations are missing, repeated, unknown or out of order, or a number is
            negative.
    """

    name: str
    mode: ForwardMode
    steps: tuple[str, ...]
    delta_stages: int
    comm_sms: int = 0

    def __post_init__(self) -> None:
        for field, value in (("delta_stages", self.delta_stages), ("comm_sms", self.comm_sms)):
            if value < 0:
                raise UserError(f"strategy {self.name}: {field} = {value} must be at least 0")
        self._check_operations()

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations in order, without the marks."""
        return tuple(step for step in self.steps if step != MARK)

    @property
    def num_stages(self) -> int:
        """Stages of one layer alone."""
        return len([stage for stage in " ".join(self.steps).split(MARK) if stage.strip()])

    def arrange(self, operations: Iterable[Operation]) -> list[Step]:
        """A layer's operations in the strategy's order, with its marks."""
        by_name = {operation.name: operation for operation in operations}
        return [YieldOperation() if step == MARK else by_name[step] for step in self.steps]

    def check_lead(self, stages: int) -> None:
        """Raise UserError where a batch would be further ahead than there are stages."""
        if self.delta_stages > stages:
            raise UserError(
                f"strategy {self.name}: delta_stages = {self.delta_stages} must be at most "
                f"{stages}, the stages of the layers that overlap"
            )

    def describe(self) -> str:
        """The steps on one line."""
        return ", ".join(self.steps).replace(f", {MARK}", f" {MARK}").replace(f"{MARK},", MARK)

    def to_json(self) -> dict[str, Any]:
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
    def from_json(cls, data: dict[str, Any]) -> OverlapStrategy:
        """Rebuild a strategy.

        Raises:
            UserError: it is none.
        """
        fields = dict(data)
        return _from_fields(str(fields.pop("name", "unnamed")), fields)

    def _check_operations(self) -> None:
        where = f"strategy {self.name}"
        seen: list[str] = []
        for name in self.operations:
            if name not in NEEDS:
                raise UserError(f"{where}: there is no operation {name!r}: {', '.join(NEEDS)}")
            if name in seen:
                raise UserError(f"{where}: {name} is there twice")
            seen.append(name)
        missing = [name for name in NEEDS if name not in seen]
        if missing:
            raise UserError(f"{where}: {', '.join(missing)} missing: a layer needs every operation")
        for name in seen:
            late = [need for need in NEEDS[name] if seen.index(need) > seen.index(name)]
            if late:
                raise UserError(f"{where}: {name} comes before {late[0]}, whose result it needs")


def _strategy(
    name: str, mode: ForwardMode, steps: str, delta: int, sms: int = 0
) -> OverlapStrategy:
    return OverlapStrategy(name, mode, tuple(steps.split()), delta, sms)


_PREFILL = """
    comm_prepare_attn attn_prepare attn_core comm_prepare_mlp gate select_experts dispatch_a
    | dispatch_b experts combine_a
    | shared_experts combine_b output comm_postprocess_layer
"""

STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        _strategy(
            "deepseek-decode-before",
            ForwardMode.DECODE,
            """comm_prepare_attn attn_prepare
            | attn_core comm_prepare_mlp gate select_experts
            | dispatch_a shared_experts
            | dispatch_b experts combine_a
            | combine_b output comm_postprocess_layer |""",
            2,
        ),
        _strategy(
            "deepseek-decode",
            ForwardMode.DECODE,
            """comm_prepare_attn attn_prepare
            | attn_core comm_prepare_mlp gate select_experts
            | dispatch_a shared_experts
            | dispatch_b experts combine_a
            | combine_b
            | output comm_postprocess_layer""",
            2,
        ),
        _strategy("deepseek-prefill", ForwardMode.EXTEND, _PREFILL, 0, COMM_SMS),
        _strategy("dsv4-prefill", ForwardMode.EXTEND, _PREFILL, 0),
    )
}
"""Strategies by name."""

PLAIN = {
    ForwardMode.DECODE: STRATEGIES["deepseek-decode"],
    ForwardMode.EXTEND: STRATEGIES["dsv4-prefill"],
}
"""Order in which a batch that is alone runs a layer."""


def load_strategy(name_or_path: str) -> OverlapStrategy:
    """A strategy by name, or from a TOML file.

    The file has ``mode`` ("decode" or "extend"), ``operations`` (names with ``|`` between stages,
    in a string), and, if not 0, ``delta_stages`` and ``comm_sms``.

    Raises:
        UserError: neither a name nor a readable file, or not a strategy.
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
        UserError: one is not known, or two are for one mode.
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


def _from_fields(name: str, data: dict[str, Any]) -> OverlapStrategy:
    for key, value in data.items():
        if key not in _FIELDS:
            raise UserError(f"strategy {name}: {key!r} is not known: {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            raise UserError(f"strategy {name}: {key} = {value!r} must be a {_FIELDS[key].__name__}")
    for key in ("mode", "operations"):
        if key not in data:
            raise UserError(f"strategy {name}: {key!r} is missing")
    modes = {mode.value: mode for mode in ForwardMode}
    if data["mode"] not in modes:
        raise UserError(f"strategy {name}: mode {data['mode']!r} must be {' or '.join(modes)}")
    steps = data["operations"].replace(MARK, f" {MARK} ").replace(",", " ").split()
    return OverlapStrategy(
        name,
        modes[data["mode"]],
        tuple(steps),
        data.get("delta_stages", 0),
        data.get("comm_sms", 0),
    )


@dataclass(frozen=True)
class Concatenated:
    """The layers of a stage, one after the other.

    Attributes:
        stages: operations between marks; a stage may run from one layer into the next.
        delta_stages: see :class:`OverlapStrategy`.
        comm_sms: the same.
    """

    stages: tuple[Stage, ...]
    delta_stages: int
    comm_sms: int


def concatenate(
    layers: Iterable[tuple[OverlapStrategy, Iterable[Operation]]],
) -> Concatenated:
    """Put layers, each with its strategy, one after the other.

    Raises:
        UserError: strategies that differ in how far a batch is ahead, or in SMs, or a batch that
            would be further ahead than there are stages.
    """
    pairs = list(layers)
    found = {(strategy.delta_stages, strategy.comm_sms) for strategy, _ in pairs}
    if len(found) != 1:
        told = sorted(
            {f"{s.name}: delta_stages {s.delta_stages}, comm_sms {s.comm_sms}" for s, _ in pairs}
        )
        raise UserError(f"layers that overlap must agree: {'; '.join(told)}")
    steps = [step for strategy, operations in pairs for step in strategy.arrange(operations)]
    stages = tuple(cut_stages(steps))
    pairs[0][0].check_lead(len(stages))
    return Concatenated(stages, *found.pop())
