"""What a measured Timeline tells of its run, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar

from runner.config.environ import Environ
from runner.config.model import ModelConfig
from runner.errors import UserError
from runner.kernels.installed import find_library
from runner.kernels.rules import RULES
from runner.kernels.source import KernelSource, choose_source
from runner.scenario import Scenario
from runner.standin.gpus import gpu_named
from runner.timeline import Timeline

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class RunMachine:
    """Where a run was.

    Attributes:
        cores: CPU cores of a machine.
        hosts: number of machines.
        link: what ranks communicate over, as torch calls it.
        ranks_per_gpu: ranks that share a GPU.
        probe: seconds that the reference compile took just before the run; None where none was.
    """

    cores: int
    hosts: int
    link: str
    ranks_per_gpu: int
    probe: float | None


@dataclass(frozen=True)
class Told:
    """What a measured Timeline tells.

    Attributes:
        scenario: what was run.
        machine: where.
        on_gpu: whether its forwards were a GPU's work.
    """

    scenario: Scenario
    machine: RunMachine
    on_gpu: bool


def told_by(timeline: Timeline, models: Mapping[str, ModelConfig]) -> Told:
    """Check all that a measured Timeline tells and is read anywhere.

    Args:
        timeline: the run.
        models: whole models by the name that a Timeline has of them.

    Raises:
        UserError: it lacks something, has it in another form, is of a model that is neither there
            nor a preset, or of a run that compiled nothing.
    """
    try:
        told = _read(timeline, models)
    except KeyError as error:
        raise UserError(
            f"a Timeline of {timeline.policy} does not tell its {error}: it was written by an "
            "older version, measure it again"
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(
            f"a Timeline of {timeline.policy} tells of no run that is known here: {error}"
        ) from None
    jit = timeline.meta["jit"]
    if jit.startswith("off"):
        raise UserError(
            f"a Timeline of {timeline.policy} is of a run without a JIT, which tells nothing of a "
            f"start-up that compiles ({jit})"
        )
    return told


def _read(timeline: Timeline, models: Mapping[str, ModelConfig]) -> Told:
    meta = timeline.meta
    scenario = Scenario.from_json(
        {**meta, "policy": timeline.policy}, source=_source(meta), models=models
    )
    if scenario.parallel.world_size != timeline.world_size:
        raise ValueError(f"it is of {timeline.world_size} ranks, its layout of another number")
    if timeline.wall <= 0:
        raise ValueError("nothing in it takes any time")
    for name in ("jit", "device", "compute"):
        _text(meta, name)
    machine = _machine(meta)
    if scenario.parallel.nodes % machine.hosts:
        raise ValueError(f"its {scenario.parallel.nodes} nodes are not on {machine.hosts} hosts")
    return Told(scenario, machine, (meta["device"], meta["compute"]) == ("cuda", "real"))


def _source(meta: Mapping[str, Any]) -> KernelSource:
    """The library that the run had; Timelines that do not tell are older than the second one.

    Raises:
        UserError: a library that nobody knows here.
    """
    if meta.get("library", RULES.origin.library) == RULES.origin.library:
        return RULES
    gpu = gpu_named(_text(meta, "gpu"), _count(meta, "num_sms"))
    library = _text(meta, "library").replace(" ", "==")
    return choose_source(gpu, find_library(library) or library, Environ())


def _machine(meta: Mapping[str, Any]) -> RunMachine:
    facts = meta["machine"]
    if not isinstance(facts, dict):
        raise _other(meta, "machine", "a machine")
    machine = RunMachine(
        cores=_count(facts, "cores"),
        hosts=_count(meta, "hosts"),
        link=_text(meta, "link"),
        ranks_per_gpu=_count(meta, "ranks_per_gpu"),
        probe=_or_none(_positive, facts, "probe") if "probe" in facts else None,
    )
    _text(facts, "date")
    _or_none(_text, facts, "gpu")
    return machine


def _text(meta: Mapping[str, Any], name: str) -> str:
    value = meta[name]
    if not isinstance(value, str):
        raise _other(meta, name, "a word")
    return value


def _flag(meta: Mapping[str, Any], name: str) -> bool:
    value = meta[name]
    if not isinstance(value, bool):
        raise _other(meta, name, "true or false")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _count(meta: Mapping[str, Any], name: str) -> int:
    value = meta[name]
    if not _is_count(value):
        raise _other(meta, name, "a whole number from 1 on")
    return int(value)


def _counts(meta: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = meta[name]
    if not isinstance(values, list) or not all(map(_is_count, values)):
        raise _other(meta, name, "a list of whole numbers from 1 on")
    return tuple(values)


def _positive(meta: Mapping[str, Any], name: str) -> float:
    value = meta[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not isfinite(value) or value <= 0:
        raise _other(meta, name, "a number above 0")
    return float(value)


def _or_none(
    read: Callable[[Mapping[str, Any], str], Value], meta: Mapping[str, Any], name: str
) -> Value | None:
    return None if meta[name] is None else read(meta, name)


def _other(meta: Mapping[str, Any], name: str, expected: str) -> ValueError:
    return ValueError(f"its {name!r} is {_short(meta[name])}, not {expected}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
