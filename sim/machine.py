"""The machine of a simulated run, and the options that describe it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf

from runner.config.fields import OptionDetails, check_tuples, option
from runner.config.parallel import ParallelConfig
from runner.config.timeouts import TORCH_TIMEOUTS_HELP
from runner.errors import UserError
from runner.scenario import Scenario
from runner.standin.gpus import DEFAULT_GPU, GPUS, gpu_named
from sim.costs.profile import Link, Profile, slowed
from sim.costs.profile_costs import ProfileCosts
from sim.costs.start_up import PHASES, StartPhases, Weights


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a simulated run."""

    profile: Profile
    host_factor: float = 1.0  # CPU time relative to the profile's
    cores_per_node: int | None = None  # CPU cores of a machine; None means the profile's
    hosts: int | None = None  # machines that the nodes are on; None means one per node
    link: str = "nvlink"  # one of the profile's links
    ranks_per_gpu: int = 1
    nccl_timeout: float | None = None  # seconds in a collective; None means torch's for the link
    run_ahead: bool | None = None  # whether hosts queue communication and go on; None: by the link
    start: StartPhases = field(default_factory=lambda: StartPhases(()))  # before the warm-up
    fold: bool = True  # simulate only one of several replicas that behave alike

    @cached_property
    def costs(self) -> ProfileCosts:
        """How long operations take here."""
        profile = slowed(self.profile, self.host_factor)
        cores = self.cores_per_node or profile.cores_per_node
        return ProfileCosts(profile, profile.links[self.link], cores, self.ranks_per_gpu)

    def hosts_of(self, parallel: ParallelConfig) -> int:
        """Machines that a layout's nodes are on.

        Raises:
            UserError: the nodes do not fit the hosts.
        """
        hosts = parallel.nodes if self.hosts is None else self.hosts
        if hosts < 1 or parallel.nodes % hosts:
            raise UserError(f"hosts={hosts} must divide the {parallel.nodes} nodes")
        return hosts


_SKIPPABLE = {name.replace(" ", "-"): name for name in PHASES}


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Options for the machine of a simulated run; see :class:`Machine`."""

    hardware: str = option("h200", OptionDetails("Profile name or file."))
    cores: int | None = option(
        None, OptionDetails("CPU cores of a node.  [default: the profile's]", least=1)
    )
    hosts: int | None = option(
        None, OptionDetails("Machines that the nodes share.  [default: one per node]", metavar="N")
    )
    host_factor: float = option(
        1.0,
        OptionDetails("CPU time relative to the profile's, as measured by runner probe.", unit="X"),
    )
    link: str = option("nvlink", OptionDetails("One of the profile's links."))
    ranks_per_gpu: int = option(1, OptionDetails("Ranks that share a GPU.", least=1))
    nccl_timeout: float | None = option(
        None,
        OptionDetails(
            "Longest wait in a collective before the watchdog ends the run.  [default: "
            f"{TORCH_TIMEOUTS_HELP}]",
            unit="SECONDS",
        ),
    )
    run_ahead: bool | None = option(
        None,
        OptionDetails("Whether hosts queue communication and go on.  [default: as the link does]"),
    )
    weights: Weights = option(
        Weights.DISK,
        OptionDetails("Where weights come from; dummy ones are made up, as launch does."),
    )
    skip_phase: tuple[str, ...] = option(
        (),
        OptionDetails("Leave out a phase before the warm-up.", choices=tuple(_SKIPPABLE)),
    )

    def __post_init__(self) -> None:
        check_tuples(self)
        for name in ("cores", "ranks_per_gpu"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise UserError(f"{name}={count} must be at least 1")
        for name in ("host_factor", "nccl_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise UserError(f"{name}={value} must be a finite number above 0")
        for phase in self.skip_phase:
            if phase not in _SKIPPABLE:
                raise UserError(f"skip_phase {phase!r} must be one of {', '.join(_SKIPPABLE)}")

    def machine(self, profile: Profile) -> Machine:
        """Make the machine, with a profile's costs.

        Raises:
            UserError: the profile lacks the link.
        """
        link_of(profile, self.link)
        skipped = {_SKIPPABLE[name] for name in self.skip_phase}
        included = tuple(name for name in PHASES if name not in skipped)
        return Machine(
            profile=profile,
            host_factor=self.host_factor,
            cores_per_node=self.cores,
            link=self.link,
            ranks_per_gpu=self.ranks_per_gpu,
            nccl_timeout=self.nccl_timeout,
            hosts=self.hosts,
            run_ahead=self.run_ahead,
            start=StartPhases(included, self.weights),
        )


def link_of(profile: Profile, name: str) -> Link:
    """Find a link of the profile.

    Raises:
        UserError: the profile has no such link.
    """
    if name not in profile.links:
        known = ", ".join(profile.links)
        raise UserError(f"--link {name!r} is not in profile {profile.name}: use one of {known}")
    return profile.links[name]


def with_walk_memory(scenario: Scenario, profile: Profile) -> Scenario:
    """Limit the scenario's walks to the GPU memory that is free once a server has its cache."""
    if scenario.walk_memory is not None:
        return scenario
    return replace(scenario, walk_memory=profile.gpu.memory * profile.start_up.graph_free)


def gpu_of(profile: Profile) -> str:
    """The GPU of a profile: the one in its name, or h200 if the SM counts agree.

    Raises:
        UserError: the profile is for some other GPU.
    """
    names = [gpu.name for gpu in GPUS]
    if profile.name in names:
        return profile.name
    sms = gpu_named(DEFAULT_GPU).num_sms
    if profile.num_sms != sms:
        raise UserError(
            f"--hardware {profile.name} has {profile.num_sms} SMs, but a {DEFAULT_GPU} has {sms}: "
            f"name the GPU with --gpu ({', '.join(names)})"
        )
    return DEFAULT_GPU
