"""Hardware profiles: measured constants of a machine type, with their provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, TypeVar, get_args, get_origin

from runner.config.fields import field_types, from_plain, without_none
from runner.errors import UserError
from runner.files import parse_json, write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Record = TypeVar("Record", bound=DataclassInstance)


@dataclass(frozen=True)
class Link:
    """A link between ranks."""

    latency: float  # seconds before the first byte
    bandwidth: float  # bytes per second of reductions and transfers
    gather_bandwidth: float | None = None  # of gathers; None means ``bandwidth``
    queues: bool = False  # whether hosts queue communication on GPUs and run ahead, as over NCCL

    def seconds(self, nbytes: float) -> float:
        """Time to move ``nbytes``."""
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class CompileTimes:
    """Seconds of one compile alone on a node, and how compiles slow each other down.

    When all cores of a node compile, each compile takes ``1 + contention`` times as long as
    alone; the slowdown is linear in the number of compiles.
    """

    by_config: Mapping[str, float]  # by sim.costs.profile_costs.config_key, where measured
    scale: Mapping[str, float]  # by template, times runner.build.estimates.plain_seconds
    default_scale: float  # ``scale`` of other templates
    contention: float


@dataclass(frozen=True)
class Builder:
    """Our builder on all cores, relative to the estimates of :mod:`runner.build.estimates`."""

    start: float  # seconds before the first front end
    scale: float  # of everything after that


@dataclass(frozen=True)
class Cache:
    """Seconds per compiled kernel on disk."""

    verify: float  # to check that it is whole
    load: float  # to load it on its own
    first_use: float  # to load it inside a call


@dataclass(frozen=True)
class Host:
    """Seconds of host work."""

    call: float  # one operation of a forward
    shared_call: float  # the same if ranks share a GPU
    first_forward: float  # extra for a rank's first forward, when libraries initialise the GPU
    walk: float  # one walk, for its buffers and its end
    walk_call: float  # one call of a walk whose kernel is loaded


@dataclass(frozen=True)
class Gpu:
    """Sustained rates of the GPU, per second."""

    memory: float  # bytes
    kernel: float  # seconds of overhead per DeepGEMM call
    memory_bandwidth: float  # bytes
    fp8_flops: float  # operations of FP8 GEMMs
    bf16_flops: float  # operations of everything else
    time_slice: float = 0.0  # seconds that a step over NCCL waits for each other rank on the GPU


@dataclass(frozen=True)
class Phase:
    """A phase of start-up: seconds, plus seconds per rank that shares the machine."""

    seconds: float
    per_rank: float = 0.0

    def of(self, ranks: int) -> float:
        """Seconds with ``ranks`` ranks on a machine."""
        return self.seconds + self.per_rank * ranks


@dataclass(frozen=True)
class StartUp:
    """Costs before the warm-up, and of graph captures."""

    imports: Phase  # until a process has imported its libraries
    process_group: Phase  # until the ranks have met
    weights: Phase  # until a rank's model is set up, not counting its bytes
    weight_bandwidth: Mapping[str, float]  # bytes per second of a machine: disk, page-cache
    weights_made: float  # elements of dummy weights that a GPU makes per second
    capture: float  # seconds of a graph capture
    capture_operation: float  # seconds of each operation in it
    graph_free: float  # share of the GPU's memory that is free once a server has its cache


@dataclass(frozen=True)
class Probe:
    """How fast the machine was when it was measured."""

    seconds: float  # of runner.build.probe.probe_seconds


@dataclass(frozen=True)
class Validation:
    """Errors of predicted wall times, on measured runs outside the fit."""

    runs: int
    median_error: float  # of absolute relative errors
    worst_error: float
    source: str  # where the runs are


@dataclass(frozen=True)
class Profile:
    """One machine type."""

    name: str  # as ``--hardware`` takes it
    num_sms: int  # SMs of the GPU
    cores_per_node: int  # CPU cores
    probe: Probe
    compile: CompileTimes
    builder: Builder
    cache: Cache
    host: Host
    gpu: Gpu
    links: Mapping[str, Link]
    start_up: StartUp
    provenance: list[str] = field(default_factory=list)  # where the numbers come from
    estimate: bool = False  # derived from public figures instead of measured
    validation: Validation | None = None

    @classmethod
    def from_json(cls, data: object) -> Profile:
        """Build a profile from its JSON form.

        Raises:
            ValueError, TypeError: another form, or a value out of range.
        """
        profile = _read_record(cls, data, "")
        for source in _WEIGHT_SOURCES:
            if source not in profile.start_up.weight_bandwidth:
                raise ValueError(f"start_up.weight_bandwidth lacks {source}")
        return profile

    def to_json(self) -> dict[str, object]:
        """Plain data; :meth:`from_json` is its inverse."""
        return asdict(self)


_RETIRED = ("compile.spread", "probe.settling")
"""Fields of older profiles that are no longer used."""

_NOT_ZERO = ("num_sms", "cores", "bandwidth", "flops", "memory", "probe", "weights_made")
"""Parts of field names whose numbers are divisors, and so must not be 0."""

_WEIGHT_SOURCES = ("disk", "page-cache")


def _read_record(kind: type[Record], data: object, name: str) -> Record:
    prefix = f"{name}." if name else ""
    if not isinstance(data, Mapping):
        raise ValueError(f"{name or 'a profile'} is {data!r}, not an object")
    types, values = field_types(kind), {}
    for key, value in data.items():
        if f"{prefix}{key}" in _RETIRED:
            continue
        if key not in types:
            raise ValueError(f"{name or 'a profile'} has no field {key!r}")
        values[key] = _read(types[key], value, f"{prefix}{key}")
    return kind(**values)


def _read(kind: object, value: object, name: str) -> object:
    """Convert the JSON value of field ``name`` to the field's type."""
    if value is None and NoneType in get_args(kind):
        return None
    kind = without_none(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return _read_record(kind, value, name)
    if get_origin(kind) is Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r}, not an object")
        each = get_args(kind)[1]
        return {key: _read(each, item, f"{name}.{key}") for key, item in value.items()}
    try:
        return from_plain(kind, value, zero=not any(word in name for word in _NOT_ZERO))
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from None


def slowed(profile: Profile, factor: float) -> Profile:
    """The profile of a machine whose CPUs take ``factor`` times as long."""
    phases = ("imports", "process_group", "weights", "capture", "capture_operation")
    return replace(
        profile,
        compile=_scaled(profile.compile, factor, ("by_config", "scale", "default_scale")),
        builder=_scaled(profile.builder, factor),
        cache=_scaled(profile.cache, factor),
        host=_scaled(profile.host, factor),
        start_up=_scaled(profile.start_up, factor, phases),
    )


def _scaled(record: Record, factor: float, names: tuple[str, ...] = ()) -> Record:
    """Multiply the named fields of a record (by default all of them) by ``factor``."""
    scaled: dict[str, object] = {}
    for name in names or [item.name for item in fields(record)]:
        value = getattr(record, name)
        if isinstance(value, Phase):
            scaled[name] = _scaled(value, factor)
        elif isinstance(value, Mapping):
            scaled[name] = {key: factor * seconds for key, seconds in value.items()}
        else:
            scaled[name] = factor * value
    return replace(record, **scaled)


def shipped_profiles() -> list[str]:
    """Names that :func:`load_profile` knows."""
    folder = resources.files("sim.costs") / "profiles"
    return sorted(
        item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")
    )


def load_profile(name_or_path: str) -> Profile:
    """Load a shipped profile, or one from a JSON file.

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
        return Profile.from_json(parse_json(path.read_text()))
    except OSError as error:
        raise UserError(f"cannot read {name_or_path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{name_or_path} is not a hardware profile: {error!r}") from None


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile where :func:`load_profile` can read it."""
    write_json(path, profile.to_json(), indent=1)
