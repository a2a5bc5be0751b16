"""What a measured Timeline's metadata says: what was run, and on which machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any, TypeVar

from runner.config.environ import Environ
from runner.config.gemm_algo import Bf16Fp32Algo
from runner.config.hf import load_model, with_layers
from runner.config.model import ModelConfig
from runner.config.parallel import ParallelConfig
from runner.config.presets import PRESETS
from runner.driver.warmup import DisaggregationMode, WarmupOptions, WarmupPolicy
from runner.errors import UserError
from runner.kernels.choose import choose_source
from runner.kernels.installed import find_library
from runner.kernels.rules import RULES
from runner.kernels.source import KernelSource
from runner.model.strategy import OverlapStrategy
from runner.scenario import Scenario
from runner.standin.gpus import gpu_named
from runner.timeline import Timeline
from sim.costs.profile import Profile
from sim.costs.start_up import PHASES, StartPhases, Weights
from sim.simulate import Machine

Value = TypeVar("Value")

_LINKS = {"gloo": "gloo", "nccl": "nvlink"}
"""A profile's link by the backend of torch.distributed that a run used."""


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """A measured run: what ran, and on which machine."""

    scenario: Scenario
    cores: int  # CPU cores of a machine
    hosts: int  # number of machines
    backend: str  # of torch.distributed
    ranks_per_gpu: int
    probe: float | None  # seconds of the reference compile just before the run
    on_gpu: bool  # whether a GPU did the work of the forwards

    def host_factor(self, profile: Profile) -> float:
        """How many times as long as the profile's CPUs this machine's take; 1 without a probe."""
        return 1.0 if self.probe is None else self.probe / profile.probe.seconds

    def machine(self, profile: Profile) -> Machine:
        """The run's machine with the profile's costs, as :func:`sim.simulate.simulate` takes it.

        Raises:
            UserError: the profile has no link for the run's backend.
        """
        if self.backend not in _LINKS:
            raise UserError(f"link {self.backend!r} is not known: use {' or '.join(_LINKS)}")
        link = _LINKS[self.backend]
        if link not in profile.links:
            raise UserError(f"profile {profile.name} has no link {link!r}, which {self.backend} is")
        if not self.on_gpu:
            profile = replace(
                profile,
                host=replace(profile.host, first_forward=0.0),
                start_up=replace(profile.start_up, weights_made=inf),
            )
        return Machine(
            profile=profile,
            host_factor=self.host_factor(profile),
            cores_per_node=self.cores,
            hosts=self.hosts,
            link=link,
            ranks_per_gpu=self.ranks_per_gpu,
            nccl_timeout=inf,
            # The driver waits for each communication, to measure it.
            run_ahead=False,
            start=StartPhases(PHASES, Weights.DUMMY),
        )


def read_metadata(timeline: Timeline, models: Mapping[str, ModelConfig] = PRESETS) -> RunMetadata:
    """Read and check the metadata of a measured Timeline.

    Args:
        timeline: the run.
        models: models with all their layers, by the name that Timelines give them.

    Raises:
        UserError: a field is missing or malformed, the model is neither in ``models`` nor a
            preset, or the run had no JIT.
    """
    try:
        run = _read(timeline, models)
    except KeyError as error:
        raise UserError(
            f"a Timeline of {timeline.policy} lacks {error}: an older version wrote it, "
            "measure the run again"
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(
            f"a Timeline of {timeline.policy} describes no run that can be simulated: {error}"
        ) from None
    jit = timeline.meta["jit"]
    if jit.startswith("off"):
        raise UserError(
            f"a Timeline of {timeline.policy} is of a run without a JIT, which says nothing about "
            f"a start-up that compiles ({jit})"
        )
    return run


def _read(timeline: Timeline, models: Mapping[str, ModelConfig]) -> RunMetadata:
    meta = timeline.meta
    scenario = _scenario(WarmupPolicy(timeline.policy), meta, models)
    parallel = scenario.parallel
    if parallel.world_size != timeline.world_size:
        raise ValueError(
            f"it has {timeline.world_size} ranks, its layout has {parallel.world_size}"
        )
    if timeline.wall <= 0:
        raise ValueError("nothing in it takes any time")
    facts = meta["machine"]
    if not isinstance(facts, dict):
        raise _malformed(meta, "machine", "an object")
    for values, name in ((meta, "jit"), (facts, "date")):
        _text(values, name)
    _or_none(_text, facts, "gpu")
    run = RunMetadata(
        scenario=scenario,
        cores=_count(facts, "cores"),
        hosts=_count(meta, "hosts"),
        backend=_text(meta, "link"),
        ranks_per_gpu=_count(meta, "ranks_per_gpu"),
        probe=_or_none(_positive, facts, "probe") if "probe" in facts else None,
        on_gpu=(_text(meta, "device"), _text(meta, "compute")) == ("cuda", "real"),
    )
    if parallel.nodes % run.hosts:
        raise ValueError(f"its {parallel.nodes} nodes cannot be split over {run.hosts} hosts")
    return run


def _source(meta: Mapping[str, Any]) -> KernelSource:
    """The run's library. Timelines that name none are from before a second one was supported.

    Raises:
        UserError: the library is not known.
    """
    if meta.get("library", RULES.origin.library) == RULES.origin.library:
        return RULES
    gpu, library = gpu_named(_text(meta, "gpu"), _count(meta, "num_sms")), _text(meta, "library")
    return choose_source(
        gpu,
        find_library(library.replace(" ", "==")),
        environ=Environ(),
        environment=os.environ,
        version_text=None,
        wanted=library.replace(" ", "=="),
    )


def _scenario(
    policy: WarmupPolicy, meta: Mapping[str, Any], models: Mapping[str, ModelConfig]
) -> Scenario:
    name = _text(meta, "model")
    return Scenario(
        parallel=ParallelConfig(
            pp=_count(meta, "pp"),
            tp=_count(meta, "tp"),
            ep=_flag(meta, "ep"),
            attn_cp=_count(meta, "attn_cp"),
            replicas=_count(meta, "replicas"),
            # Older Timelines have neither this nor ``overlap``.
            moe_a2a="moe_a2a" in meta and _flag(meta, "moe_a2a"),
            nodes=_count(meta, "nodes"),
            stage_layers=_or_none(_counts, meta, "stage_layers"),
        ),
        warmup=WarmupOptions(
            policy=policy,
            batch_sizes=_counts(meta, "batch_sizes"),
            disaggregation=DisaggregationMode(meta["disaggregation"]),
            speculative=_flag(meta, "speculative"),
            graph_batch_sizes=_counts(meta, "graph_batch_sizes"),
            walk_max_m=_or_none(_count, meta, "walk_max_m"),
            compile_lock=_flag(meta, "compile_lock"),
        ),
        num_sms=_count(meta, "num_sms"),
        prompt_len=_count(meta, "prompt_len"),
        bf16_fp32_algo=Bf16Fp32Algo(meta["bf16_fp32_algo"]),
        max_tokens=_count(meta, "max_tokens"),
        stream=_or_none(_counts, meta, "stream"),
        walk_memory=_or_none(_positive, meta, "walk_memory"),
        overlap=tuple(map(OverlapStrategy.from_json, meta.get("overlap", ()))),
        source=_source(meta),
        model=with_layers(
            models[name] if name in models else load_model(name), _count(meta, "layers")
        ),
    )


def _text(meta: Mapping[str, Any], name: str) -> str:
    return str(_checked(meta, name, lambda value: isinstance(value, str), "a string"))


def _flag(meta: Mapping[str, Any], name: str) -> bool:
    return bool(_checked(meta, name, lambda value: isinstance(value, bool), "true or false"))


def _count(meta: Mapping[str, Any], name: str) -> int:
    return int(_checked(meta, name, _is_count, "a whole number of at least 1"))


def _counts(meta: Mapping[str, Any], name: str) -> tuple[int, ...]:
    def holds(value: object) -> bool:
        return isinstance(value, list) and all(map(_is_count, value))

    return tuple(_checked(meta, name, holds, "a list of whole numbers of at least 1"))


def _positive(meta: Mapping[str, Any], name: str) -> float:
    def holds(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return isfinite(value) and value > 0

    return float(_checked(meta, name, holds, "a number above 0"))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _or_none(
    read: Callable[[Mapping[str, Any], str], Value], meta: Mapping[str, Any], name: str
) -> Value | None:
    return None if meta[name] is None else read(meta, name)


def _checked(
    meta: Mapping[str, Any], name: str, holds: Callable[[object], bool], expected: str
) -> Any:
    if not holds(meta[name]):
        raise _malformed(meta, name, expected)
    return meta[name]


def _malformed(meta: Mapping[str, Any], name: str, expected: str) -> ValueError:
    text = repr(meta[name])
    text = text if len(text) <= 40 else f"{text[:37]}..."
    return ValueError(f"its {name!r} is {text}, not {expected}")
