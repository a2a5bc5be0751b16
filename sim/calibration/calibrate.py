"""Fit a hardware profile to measured runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from statistics import fmean

from runner.timeline import Timeline
from sim.calibration.data import read_calibration_data
from sim.calibration.fit_compiles import fit_compile_times
from sim.calibration.fit_sections import FittedLine, SectionFits
from sim.calibration.run_metadata import read_metadata
from sim.calibration.validation import ValidatedRun, validate
from sim.costs.profile import Probe, Profile


@dataclass(frozen=True)
class Calibration:
    """A fitted profile and its fitted figures."""

    profile: Profile
    fitted: list[FittedLine]


def fit_profile(measured: Sequence[Timeline], base: Profile, name: str) -> Calibration:
    """Fit a profile called ``name``; values that no run gives come from ``base``.

    Raises:
        UserError: a Timeline's metadata cannot be read.
    """
    probes = [read_metadata(timeline).probe for timeline in measured]
    timed = [seconds for seconds in probes if seconds is not None]
    if timed:
        base = replace(base, probe=Probe(round(exp(fmean(map(log, timed))), 4)))
    # The GPU explains part of the host's time: fit its rates first, then read the runs again.
    first = SectionFits(base, [read_calibration_data(timeline, base) for timeline in measured])
    base = replace(base, gpu=first.gpu())
    data = [read_calibration_data(timeline, base) for timeline in measured]
    fit = SectionFits(base, data, first.lines)
    profile = replace(
        base,
        name=name,
        compile=fit_compile_times([run.compiles for run in data], base.compile, fit.note),
        builder=fit.builder(),
        cache=fit.cache,
        host=fit.host(),
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
    """Predict each run with a profile fitted to the others.

    ``on_step`` is called with (runs done, runs in total).
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
        f"{t.meta['tp']}, nodes {t.meta['nodes']}, {t.meta['machine']['date']}"
        for t in measured
    ]
    gpus = sorted({str(t.meta["machine"]["gpu"]) for t in measured})
    return [
        f"fitted to {len(runs)} measured runs ({', '.join(gpus)}): " + "; ".join(runs),
        f"what they do not say is from {base.name}: " + " | ".join(base.provenance),
    ]
