"""What measured compiles tell: how long, in what company, how far apart, how a run drifts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import exp, log
from statistics import fmean

from runner.build.costs import plain_seconds
from runner.config.model import ModelConfig
from runner.timeline import Timeline
from sim.calibration.data import CompileSample
from sim.calibration.fitting import Fitted, minimum
from sim.calibration.run_metadata import told_by
from sim.costs.compile_time import config_key, slowdown, template_of
from sim.costs.profile import CompileTimes, Probe, Profile

_MOST_CONTENTION = 4.0
_PRIOR = 0.5
_KNOWN_CONTENTION = 1.0
"""Weight of the contention known before: as much as a hundred compiles that are off by 10 %."""

_KNOWN_SPREAD = 20
_TOGETHER = 0.5
_SETTLING = (3.0, 300.0)
_KNOWN_SETTLING = 0.1
_ROUNDS = 12


def fit_probe(
    measured: Sequence[Timeline],
    base: Profile,
    models: Mapping[str, ModelConfig],
    fitted: list[Fitted],
) -> Probe:
    """The reference kernel's seconds: the geometric mean of the runs that have a probe."""
    told = [told_by(timeline, models).machine.probe for timeline in measured]
    seen = [seconds for seconds in told if seconds is not None]
    if not seen:
        return base.probe
    return Probe(round(exp(fmean(map(log, seen))), 4))


@dataclass(frozen=True)
class _CompileFit:
    """Compiles explained by the size of their code, their template and their company.

    Attributes:
        contention: see :class:`sim.costs.profile.CompileTimes`.
        scale: by template, against :func:`runner.build.costs.plain_seconds`.
        residuals: logarithms of what is left, of each run's compiles.
    """

    contention: float
    scale: dict[str, float]
    residuals: list[list[float]]


def _compile_fit(runs: Sequence[Sequence[CompileSample]], base: Profile) -> _CompileFit:
    """Contention makes each run's own compiles agree best; scales are geometric means."""

    # What does not hang on the contention, once for all that are tried.
    known = [
        [(one, plain_seconds(one.kernel), template_of(one.kernel)) for one in run] for run in runs
    ]

    def fit(contention: float) -> _CompileFit:
        logs = [
            [(name, log(_alone(one, contention) / plain)) for one, plain, name in run]
            for run in known
        ]
        ratios: dict[str, list[float]] = defaultdict(list)
        for name, value in chain.from_iterable(logs):
            ratios[name].append(value)
        middles = {name: fmean(values) for name, values in sorted(ratios.items())}
        left = [[value - middles[name] for name, value in run] for run in logs]
        scale = {name: round(exp(middle), 4) for name, middle in middles.items()}
        return _CompileFit(contention, scale, left)

    def disagreement(contention: float) -> float:
        # Within a run: runs differ by what the machine was doing besides.
        total = sum(_squares(run) for run in fit(contention).residuals if run)
        return total + _KNOWN_CONTENTION * (contention - base.compile.contention) ** 2

    return fit(minimum(disagreement, 0.0, _MOST_CONTENTION))


def _squares(values: Sequence[float]) -> float:
    """Sum of squares around the mean."""
    middle = fmean(values)
    return sum((value - middle) ** 2 for value in values)


def fit_compiles(
    runs: Sequence[Sequence[CompileSample]], base: Profile, fitted: list[Fitted]
) -> CompileTimes:
    """Times of compiles by configuration, and by template for others.

    Args:
        runs: the compiles of each run, in nominal seconds.
        base: what was known before.
        fitted: gets a line for each figure.
    """
    samples = list(chain.from_iterable(runs))
    if not samples:
        return base.compile
    found = _compile_fit(runs, base)
    by_config: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for sample in samples:
        by_config[config_key(sample.kernel)].append(_alone(sample, found.contention))
        counts[template_of(sample.kernel)] += 1
    scale = {**base.compile.scale, **found.scale}
    fitted += [
        Fitted("compile contention", f"{found.contention:.3f}", len(samples)),
        Fitted("compile seconds, by configuration", f"{len(by_config)} of them", len(samples)),
        *(
            Fitted(f"compile scale {name}", f"{found.scale[name]:.3f}", counts[name])
            for name in found.scale
        ),
    ]
    default = exp(fmean(log(found.scale[template_of(one.kernel)]) for one in samples))
    expected = {
        config_key(s.kernel): scale[template_of(s.kernel)] * plain_seconds(s.kernel)
        for s in samples
    }
    settled = _settled(by_config, expected)
    return CompileTimes(settled, scale, round(default, 4), round(found.contention, 4))


def _alone(sample: CompileSample, contention: float) -> float:
    """Seconds that the compile would have taken without company."""
    times = CompileTimes({}, {}, 1.0, contention)
    low = int(sample.company)
    share = sample.company - low
    slow = (1 - share) * slowdown(times, max(low, 1), sample.cores)
    slow += share * slowdown(times, low + 1, sample.cores)
    return sample.seconds / slow


def _settled(
    found: Mapping[str, Sequence[float]], expected: Mapping[str, float]
) -> dict[str, float]:
    """Geometric means with the expectation, which counts as half a sample."""
    return {
        key: round(
            exp((sum(map(log, values)) + _PRIOR * log(expected[key])) / (len(values) + _PRIOR)), 4
        )
        for key, values in sorted(found.items())
    }
