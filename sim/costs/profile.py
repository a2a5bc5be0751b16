"""Hardware profiles: measured constants of one machine type, as data with their provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from math import isfinite
from pathlib import Path
from typing import Any

from runner.errors import UserError
from runner.files import write_json


@dataclass(frozen=True)
class Link:
    """A link between ranks.

    Attributes:
        latency: seconds before the first byte.
        bandwidth: bytes per second of reductions and transfers.
        gather_bandwidth: bytes per second of gathers, which some backends do more slowly; None
            means the same.
        queues: whether hosts queue communication on their GPUs and run ahead, as over NCCL.
    """

    latency: float
    bandwidth: float
    gather_bandwidth: float | None = None
    queues: bool = False

    def seconds(self, nbytes: float) -> float:
        """Time to move ``nbytes``."""
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class CompileTimes:
    """Seconds of one compile alone on a node, and what company costs.

    Attributes:
        by_config: seconds by :func:`sim.costs.compile_time.config_key`, where measured.
        scale: by template, against :func:`runner.build.costs.plain_seconds`, which follows
            from the size of a kernel's code.
        default_scale: the same for templates that are not listed.
        contention: with all cores of a node compiling, each compile takes 1 + this many times as
            long as alone; in between the slowdown is linear in the number of compilers.
    """

    by_config: Mapping[str, float]
    scale: Mapping[str, float]
    default_scale: float
    contention: float


@dataclass(frozen=True)
class Builder:
    """Our builder against the expectation of :mod:`runner.build.costs`, all cores at work.

    Attributes:
        start: seconds before the first front end.
        scale: everything after that.
    """

    start: float
    scale: float


@dataclass(frozen=True)
class Cache:
    """Seconds for one compiled kernel on disk.

    Attributes:
        verify: to find it whole.
        load: to load it on its own.
        first_use: to load it inside a call.
    """

    verify: float
    load: float
    first_use: float


@dataclass(frozen=True)
class Host:
    """Seconds of host work.

    Attributes:
        call: one operation of a forward that has nothing to do.
        shared_call: the same where ranks share a GPU, and take turns at it.
        first_forward: what a rank's first forward takes more: libraries get their GPU ready.
        walk: one walk, for its buffers and its end.
        walk_call: one call of a walk whose kernel is loaded.
    """

    call: float
    shared_call: float
    first_forward: float
    walk: float
    walk_call: float


@dataclass(frozen=True)
class Gpu:
    """Sustained rates of the GPU.

    Attributes:
        memory: bytes.
        kernel: seconds that a DeepGEMM call takes besides what its bytes or operations take.
        memory_bandwidth: bytes per second.
        fp8_flops: operations per second of FP8 GEMMs.
        bf16_flops: operations per second of everything else.
        time_slice: seconds that a step of communication over NCCL waits for each other rank on
            the GPU to have had its turn.
    """

    memory: float
    kernel: float
    memory_bandwidth: float
    fp8_flops: float
    bf16_flops: float
    time_slice: float = 0.0


@dataclass(frozen=True)
class Phase:
    """A phase of start-up: seconds, and more of them for each rank that shares the machine."""

    seconds: float
    per_rank: float = 0.0

    def of(self, ranks: int) -> float:
        """Seconds with ``ranks`` ranks on a machine."""
        return self.seconds + self.per_rank * ranks


@dataclass(frozen=True)
class StartUp:
    """What happens before the warm-up and beside it.

    Attributes:
        imports: from a process's start until its libraries are imported.
        process_group: until the ranks have met.
        weights: until a rank's model is set up, without the time that its bytes take.
        weight_bandwidth: bytes per second of a machine, by where weights come from: ``disk`` or
            ``page-cache``.
        weights_made: elements per second that a GPU makes up, for all its ranks.
        capture: seconds of a graph capture.
        capture_operation: seconds of each operation in it.
        graph_free: share of the GPU's memory that is free once a server has its cache.
    """

    imports: Phase
    process_group: Phase
    weights: Phase
    weight_bandwidth: Mapping[str, float]
    weights_made: float
    capture: float
    capture_operation: float
    graph_free: float


@dataclass(frozen=True)
class Probe:
    """What a look at a machine just before a run tells of the run.

    Attributes:
        seconds: :func:`runner.build.probe.probe_seconds` when the profile was measured.
    """

    seconds: float


@dataclass(frozen=True)
class Validation:
    """How far a profile's predictions are off, on measured runs that it was not fitted to.

    Attributes:
        runs: number of runs.
        median_error: median absolute relative error of the wall time.
        worst_error: the largest one.
        source: where the runs are.
    """

    runs: int
    median_error: float
    worst_error: float
    source: str


@dataclass(frozen=True)
class Profile:
    """One machine type.

    Attributes:
        name: as ``--hardware`` takes it.
        num_sms: SMs of the GPU.
        cores_per_node: CPU cores of a node.
        probe: how fast the machine was when it was measured.
        estimate: whether the numbers are derived from public figures instead of measured.
        provenance: where the numbers come from.
        validation: errors on measured runs; None where it was not validated.
    """

    name: str
    num_sms: int
    cores_per_node: int
    probe: Probe
    compile: CompileTimes
    builder: Builder
    cache: Cache
    host: Host
    gpu: Gpu
    links: Mapping[str, Link]
    start_up: StartUp
    provenance: list[str] = field(default_factory=list)
    estimate: bool = False
    validation: Validation | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        """Build a profile from its JSON form.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: not that form.
        """
        start_up, validation = dict(data["start_up"]), data.get("validation")
        for name in ("imports", "process_group", "weights"):
            start_up[name] = Phase(**start_up[name])
        profile = cls(
            **{
                **data,
                "probe": Probe(**_without(data["probe"], "settling")),
                "compile": CompileTimes(**_without(data["compile"], "spread")),
                "builder": Builder(**data["builder"]),
                "cache": Cache(**data["cache"]),
                "host": Host(**data["host"]),
                "gpu": Gpu(**data["gpu"]),
                "links": {name: Link(**values) for name, values in data["links"].items()},
                "start_up": StartUp(**start_up),
                "validation": None if validation is None else Validation(**validation),
            }
        )
        _check(profile)
        return profile

    def to_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` is its inverse."""
        return asdict(self)


def _without(data: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != name}


_DIVISORS = (
    "num_sms",
    "cores_per_node",
    "bandwidth",
    "flops",
    "memory",
    "probe",
    "weights_made",
)
_PLAIN: dict[str, type] = {"str": str, "bool": bool, "list[str]": list}
_WEIGHT_SOURCES = ("disk", "page-cache")


def _check(profile: Profile) -> None:
    _check_fields(profile, "")
    for source in _WEIGHT_SOURCES:
        if source not in profile.start_up.weight_bandwidth:
            raise ValueError(f"start_up.weight_bandwidth lacks {source}")


def _check_fields(owner: Any, within: str) -> None:
    for item in fields(owner):
        value, kind, name = getattr(owner, item.name), str(item.type), within + item.name
        if is_dataclass(value):
            _check_fields(value, f"{name}.")
        elif kind in _PLAIN:
            _check_type(name, value, _PLAIN[kind])
        elif kind.startswith("Mapping"):
            _check_type(name, value, Mapping)
            for key, each in value.items():
                if is_dataclass(each):
                    _check_fields(each, f"{name}.{key}.")
                else:
                    _check_number(f"{name}.{key}", each, whole=False)
        elif value is not None or not kind.endswith("None"):
            _check_number(name, value, whole=kind == "int")


def _check_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, not a {kind.__name__.lower()}")


def _check_number(name: str, value: Any, *, whole: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise TypeError(f"{name} is {value!r}, not a {'whole ' if whole else ''}number")
    divides = any(word in name for word in _DIVISORS)
    if not isfinite(value) or value < 0 or (divides and value == 0):
        raise ValueError(f"{name} is {value!r}: it must be {'above' if divides else 'at least'} 0")


def slowed(profile: Profile, factor: float) -> Profile:
    """The profile of a machine whose CPUs take ``factor`` times as long for everything."""
    if factor == 1.0:
        return profile
    times, start_up = profile.compile, profile.start_up
    return replace(
        profile,
        compile=replace(
            times,
            by_config={key: factor * seconds for key, seconds in times.by_config.items()},
            scale={key: factor * scale for key, scale in times.scale.items()},
            default_scale=factor * times.default_scale,
        ),
        builder=Builder(factor * profile.builder.start, factor * profile.builder.scale),
        cache=Cache(*(factor * seconds for seconds in _values(profile.cache))),
        host=Host(*(factor * seconds for seconds in _values(profile.host))),
        start_up=replace(
            start_up,
            imports=_slowed(start_up.imports, factor),
            process_group=_slowed(start_up.process_group, factor),
            weights=_slowed(start_up.weights, factor),
            capture=factor * start_up.capture,
            capture_operation=factor * start_up.capture_operation,
        ),
    )


def _slowed(phase: Phase, factor: float) -> Phase:
    return Phase(factor * phase.seconds, factor * phase.per_rank)


def _values(record: Cache | Host) -> list[float]:
    return [float(getattr(record, item.name)) for item in fields(record)]


def shipped_profiles() -> list[str]:
    """Names that :func:`load_profile` knows."""
    folder = resources.files("sim.costs") / "profiles"
    return sorted(
        item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")
    )


def load_profile(name_or_path: str) -> Profile:
    """A shipped profile, or one read from a JSON file.

    Raises:
        UserError: neither a shipped name nor a readable profile.
    """
    path: Path | Traversable = Path(name_or_path)
    if name_or_path in shipped_profiles():
        path = resources.files("sim.costs") / "profiles" / f"{name_or_path}.json"
    elif not path.is_file():
        known = ", ".join(shipped_profiles())
        raise UserError(
            f"hardware {name_or_path!r} is not known: use one of {known}, or a profile file"
        )
    try:
        return Profile.from_json(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(f"cannot read {name_or_path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{name_or_path} is not a hardware profile: {error!r}") from None


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile where :func:`load_profile` can read it."""
    write_json(path, profile.to_json(), indent=1)
