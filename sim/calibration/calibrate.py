"""A hardware profile fitted to measured runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from statistics import fmean

from runner.config.model import ModelConfig
from runner.config.presets import PRESETS
from runner.timeline import Timeline
from sim.calibration.data import read_calibration_data
from sim.calibration.fit_compiles import fit_compile_times
from sim.calibration.fit_sections import FittedLine, SectionFits
from sim.calibration.run_metadata import read_metadata
from sim.calibration.validation import ValidatedRun, validate
from sim.costs.profile import Probe, Profile


@dataclass(frozen=True)
class Calibration:
    """A fitted profile and the figures that were fitted."""

    profile: Profile
    fitted: list[FittedLine]


def fit_profile(
    measured: Sequence[Timeline],
    base: Profile,
    name: str,
    models: Mapping[str, ModelConfig] = PRESETS,
) -> Calibration:
    """Fit a profile; what no run says is taken from ``base``.

    Args:
        measured: the runs.
        base: the profile before.
        name: the new profile's name.
        models: see :func:`sim.calibration.run_metadata.read_metadata`.

    Raises:
        UserError: a Timeline's metadata cannot be read.
    """
    probes = [read_metadata(timeline, models).probe for timeline in measured]
    timed = [seconds for seconds in probes if seconds is not None]
    if timed:
        base = replace(base, probe=Probe(round(exp(fmean(map(log, timed))), 4)))
    # Host work is what the GPU leaves, so the GPU's rates come first, in a reading of their own.
    fit = SectionFits(
        base, [read_calibration_data(timeline, base, models) for timeline in measured]
    )
    base = replace(base, gpu=fit.gpu())
    data = [read_calibration_data(timeline, base, models) for timeline in measured]
    fit = SectionFits(base, data, fit.lines)
    compile_times = fit_compile_times([run.compiles for run in data], base.compile, fit.note)
    builder, cache = fit.builder(), fit.cache()
    profile = replace(
        base,
        name=name,
        compile=compile_times,
        builder=builder,
        cache=cache,
        host=fit.host(cache.first_use),
        links=fit.links(),
        start_up=fit.start_up(),
        provenance=_provenance(measured, base),
        estimate=False,
        validation=None,
    )
    return Calibration(profile, fit.lines)


def leave_one_out(
    measured: Sequence[Timeline],
    base: Profile,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[ValidatedRun]:
    """Each run, predicted by a profile that is fitted to the others.

    Args:
        measured: the runs.
        base: see :func:`fit_profile`.
        on_step: called with how many runs are done, and of how many.
    """
    validated = []
    for index, timeline in enumerate(measured):
        others = [*measured[:index], *measured[index + 1 :]]
        profile = fit_profile(others, base, base.name).profile if others else base
        validated += validate([timeline], profile)
        on_step(index + 1, len(measured))
    return validated


def _provenance(measured: Sequence[Timeline], base: Profile) -> list[str]:
    runs = [
        f"{t.policy}, {t.meta['model']} {t.meta['layers']} layers, pp {t.meta['pp']} tp "
        f"{t.meta['tp']}, {t.meta['nodes']} node(s), {t.meta['machine']['date']}"
        for t in measured
    ]
    gpus = sorted({str(t.meta["machine"]["gpu"]) for t in measured})
    return [
        f"fitted to {len(runs)} measured runs ({', '.join(gpus)}): " + "; ".join(runs),
        f"what they do not say is from {base.name}: " + " | ".join(base.provenance),
    ]
