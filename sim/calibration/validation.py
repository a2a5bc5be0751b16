"""Measured runs against what the simulator says of them, from what each Timeline tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import median

from runner.config.model import ModelConfig
from runner.config.presets import PRESETS
from runner.errors import UserError
from runner.scenario import Scenario
from runner.timeline import Timeline, read_timelines
from sim.calibration.run_metadata import told_by
from sim.costs.profile import Profile
from sim.costs.start_up import PHASES, StartPhases, Weights
from sim.simulate import Machine, Prediction, simulate

_LINKS = {"gloo": "gloo", "nccl": "nvlink"}


def read_measured(paths: Sequence[Path]) -> list[Timeline]:
    """Measured Timelines of several files.

    Raises:
        UserError: an unreadable file, or a prediction.
    """
    found = [timeline for path in paths for timeline in read_timelines(path)]
    for timeline in found:
        if timeline.source != "measured":
            raise UserError(
                f"{timeline.policy} is a {timeline.source} Timeline, not a measured one"
            )
    if not found:
        raise UserError("the files hold no Timeline")
    return found


def scenario_of(timeline: Timeline, models: Mapping[str, ModelConfig] = PRESETS) -> Scenario:
    """The scenario that a run was of.

    Args:
        timeline: the run.
        models: whole models by the name that a Timeline has of them.

    Raises:
        UserError: the Timeline does not say, or its model is neither there nor a preset.
    """
    return told_by(timeline, models).scenario


def machine_of(
    timeline: Timeline, profile: Profile, models: Mapping[str, ModelConfig] = PRESETS
) -> Machine:
    """The machine that a run was on, with a profile's costs; ``models``: see :func:`scenario_of`.

    Raises:
        UserError: the Timeline does not say, or the profile lacks its link.
    """
    told = told_by(timeline, models)
    machine = told.machine
    if not told.on_gpu:
        profile = replace(
            profile,
            host=replace(profile.host, first_forward=0.0),
            start_up=replace(profile.start_up, weights_made=inf),
        )
    return Machine(
        profile=profile,
        host_factor=1.0 if machine.probe is None else machine.probe / profile.probe.seconds,
        cores_per_node=machine.cores,
        hosts=machine.hosts,
        link=_link_of(machine.link, profile),
        ranks_per_gpu=machine.ranks_per_gpu,
        nccl_timeout=float("inf"),
        # The driver waits for each communication, to measure it.
        run_ahead=False,
        start=StartPhases(PHASES, Weights.DUMMY),
    )


def _link_of(name: str, profile: Profile) -> str:
    if name not in _LINKS:
        raise UserError(f"link {name!r} is not known: {' or '.join(_LINKS)}")
    link = _LINKS[name]
    if link not in profile.links:
        raise UserError(f"profile {profile.name} has no link {link!r}, which {name} is")
    return link


@dataclass(frozen=True)
class Judged:
    """A measured run and its prediction."""

    measured: Timeline
    predicted: Prediction

    @property
    def error(self) -> float:
        """Relative error of the predicted start-up, from process start to the last answer."""
        return self.predicted.timeline.wall / self.measured.wall - 1

    @property
    def counts_agree(self) -> bool:
        """Whether compiles and duplicates are exactly those measured."""
        return _counts(self.measured) == _counts(self.predicted.timeline)

    @property
    def name(self) -> str:
        """Model, layout and policy."""
        meta = self.measured.meta
        nodes = f", {meta['nodes']} nodes" if meta["nodes"] > 1 else ""
        lock = ", locked" if meta["compile_lock"] else ""
        return (
            f"{meta['model']} {meta['layers']} layers, pp {meta['pp']} tp {meta['tp']}{nodes}"
            f"{lock}, {self.measured.policy}"
        )


def _counts(timeline: Timeline) -> tuple[int, int]:
    return timeline.kernels_compiled, timeline.duplicates


def judge(
    measured: Sequence[Timeline], profile: Profile, models: Mapping[str, ModelConfig] = PRESETS
) -> list[Judged]:
    """Predict every measured run.

    Args:
        measured: the runs.
        profile: what things cost.
        models: see :func:`scenario_of`.

    Raises:
        UserError: a Timeline that does not say what it was of.
    """
    judged = []
    for timeline in measured:
        prediction = simulate(scenario_of(timeline, models), machine_of(timeline, profile, models))
        judged.append(Judged(timeline, prediction))
    return judged


def summary(judged: Sequence[Judged]) -> str:
    """Median and worst error, and how many counts are exact."""
    errors = sorted(abs(item.error) for item in judged)
    exact = sum(item.counts_agree for item in judged)
    return (
        f"{len(judged)} runs: median absolute error {median(errors):.1%}, worst {errors[-1]:.1%}; "
        f"compiles and duplicates exact in {exact}"
    )
