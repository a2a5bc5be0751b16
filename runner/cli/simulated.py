"""The options of commands that simulate, and the machine that they mean."""

from __future__ import annotations

from dataclasses import dataclass

from runner.config.fields import OptionDetails, option
from runner.config.timeouts import TORCH_TIMEOUTS_HELP
from runner.errors import UserError
from sim.costs.profile import Link, Profile
from sim.costs.start_up import PHASES, StartPhases, Weights
from sim.simulate import Machine

_SKIPPABLE = {name.replace(" ", "-"): name for name in PHASES}


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Where a simulated run happens; see :class:`sim.simulate.Machine`."""

    hardware: str = option("h200", OptionDetails("Profile name or file."))
    cores: int | None = option(
        None, OptionDetails("CPU cores of a node.  [default: the profile's]", least=1)
    )
    hosts: int | None = option(
        None, OptionDetails("Machines that the nodes share.  [default: one a node]", metavar="N")
    )
    host_factor: float = option(
        1.0,
        OptionDetails(
            "How many times as long the host's CPUs take (runner probe tells).", unit="X"
        ),
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
        OptionDetails("Leave a phase before the warm-up out.", choices=tuple(_SKIPPABLE)),
    )

    def machine(self, profile: Profile) -> Machine:
        """The machine, with a profile's costs.

        Raises:
            UserError: a link that the profile lacks.
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
    """A link of the profile.

    Raises:
        UserError: it has no such link.
    """
    if name not in profile.links:
        known = ", ".join(profile.links)
        raise UserError(f"--link {name!r} is not in profile {profile.name}: use one of {known}")
    return profile.links[name]
