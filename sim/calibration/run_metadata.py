"""Read a measured Timeline's metadata: what was run, and on which machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from runner.config.environ import Environ
from runner.config.fields import read_count, read_plain, read_text
from runner.errors import UserError
from runner.kernels.installed import find_library
from runner.kernels.rules import RULES
from runner.kernels.source import KernelSource, choose_source
from runner.scenario import Scenario
from runner.standin.gpus import gpu_named
from runner.timeline import Timeline
from sim.costs.profile import Profile
from sim.costs.start_up import PHASES, StartPhases, Weights
from sim.machine import Machine

_LINKS = {"gloo": "gloo", "nccl": "nvlink"}
"""A profile's link for each torch.distributed backend."""


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """A measured run: its scenario and its machine."""

    scenario: Scenario
    cores: int  # CPU cores of a machine
    hosts: int  # number of machines
    backend: str  # of torch.distributed
    ranks_per_gpu: int
    probe: float | None  # seconds of the reference compile just before the run
    on_gpu: bool  # whether the forwards ran on a GPU

    def host_factor(self, profile: Profile) -> float:
        """This machine's CPU time relative to the profile's; 1 without a probe."""
        return 1.0 if self.probe is None else self.probe / profile.probe.seconds

    def machine(self, profile: Profile) -> Machine:
        """The run's machine with the profile's costs, for :func:`sim.simulate.simulate`.

        Raises:
            UserError: the profile has no link for the run's backend.
        """
        if self.backend not in _LINKS:
            raise UserError(f"link {self.backend!r} is not known: use {' or '.join(_LINKS)}")
        link = _LINKS[self.backend]
        if link not in profile.links:
            raise UserError(
                f"profile {profile.name} has no link {link!r} for backend {self.backend}"
            )
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
            # The driver waits for each communication in order to measure it.
            run_ahead=False,
            start=StartPhases(PHASES, Weights.DUMMY),
        )


def read_metadata(timeline: Timeline) -> RunMetadata:
    """Read and check the metadata of a measured Timeline.

    Raises:
        UserError: a field is missing or malformed, the model is no preset, or the run had no JIT.
    """
    try:
        run = _read(timeline)
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


def _read(timeline: Timeline) -> RunMetadata:
    meta = timeline.meta
    scenario = Scenario.from_json({**meta, "policy": timeline.policy}, source=_source(meta))
    parallel = scenario.parallel
    if parallel.world_size != timeline.world_size:
        raise ValueError(
            f"it has {timeline.world_size} ranks, its layout has {parallel.world_size}"
        )
    if timeline.wall <= 0:
        raise ValueError("nothing in it takes any time")
    facts = meta["machine"]
    if not isinstance(facts, dict):
        raise ValueError("its 'machine' is not an object")
    for values, name in ((meta, "jit"), (facts, "date")):
        read_text(name, values)
    read_plain(str | None, "gpu", facts)
    probe = read_plain(float | None, "probe", facts) if "probe" in facts else None
    run = RunMetadata(
        scenario=scenario,
        cores=read_count("cores", facts),
        hosts=read_count("hosts", meta),
        backend=read_text("link", meta),
        ranks_per_gpu=read_count("ranks_per_gpu", meta),
        probe=probe if isinstance(probe, float) else None,
        on_gpu=(meta["device"], meta["compute"]) == ("cuda", "real"),
    )
    if parallel.nodes % run.hosts:
        raise ValueError(f"its {parallel.nodes} nodes cannot be split over {run.hosts} hosts")
    return run


def _source(meta: Mapping[str, Any]) -> KernelSource:
    """The run's library; Timelines that name none predate support for a second library.

    Raises:
        UserError: the library is unknown.
    """
    if meta.get("library", RULES.origin.library) == RULES.origin.library:
        return RULES
    gpu = gpu_named(read_text("gpu", meta), read_count("num_sms", meta))
    library = read_text("library", meta).replace(" ", "==")
    return choose_source(gpu, find_library(library) or library, Environ())
