"""What measured compiles tell: how long, in what company, how far apart, how a run drifts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import exp, log, sqrt
from statistics import fmean

from runner.build.estimates import plain_seconds
from runner.config.model import ModelConfig
from runner.kernels.kernel import Kernel
from runner.timeline import Timeline
from sim.calibration.data import CompileSample, take_samples
from sim.calibration.drift import Drift
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
    """The reference kernel's seconds, the runs' middle, and how long they hold in a run.

    What is fitted is added to ``fitted``; runs without a probe tell nothing of it.
    """
    told = [told_by(timeline, models).machine.probe for timeline in measured]
    seen = [seconds for seconds in told if seconds is not None]
    if not seen:
        return base.probe
    known, middle = base.probe.settling, round(exp(fmean(map(log, seen))), 4)
    runs = []
    for run, seconds in zip(measured, told, strict=True):
        if seconds is not None:
            # As measured: a profile of that very speed changes nothing.
            as_it_was = replace(base, probe=replace(base.probe, seconds=seconds))
            compiles = take_samples(run, as_it_was, models).compiles
            if compiles and round(seconds, 4) != middle:
                runs.append((seconds / middle, compiles))
    if not runs:
        return Probe(middle, known)

    def disagreement(settling: float) -> float:
        moved = [
            [_moved(one, Drift(factor, exp(settling))) for one in compiles]
            for factor, compiles in runs
        ]
        residuals = chain.from_iterable(_compile_fit(moved, base).residuals)
        off = sum(value * value for value in residuals)
        return off + _KNOWN_SETTLING * (settling - log(known)) ** 2

    shortest, longest = (log(edge) for edge in (min(_SETTLING[0], known), max(_SETTLING[1], known)))
    settling = exp(minimum(disagreement, shortest, longest, _ROUNDS))
    fitted.append(Fitted("a probe's settling", f"{settling:.0f} s", len(runs)))
    return Probe(middle, round(settling, 1))


def _moved(sample: CompileSample, drift: Drift) -> CompileSample:
    """The sample in nominal seconds."""
    start, end = (drift.nominal(at) for at in (sample.start, sample.start + sample.seconds))
    return replace(sample, start=start, seconds=end - start)


@dataclass(frozen=True)
class _CompileFit:
    """Compiles explained by the size of their code, their template and their company.

    Attributes:
        contention: see :class:`sim.costs.profile.CompileTimes`.
        scale: by template, against :func:`runner.build.estimates.plain_seconds`.
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
    spread = _spread(runs, found.contention, base.compile.spread)
    fitted.append(Fitted("compile spread, side by side", f"{spread:.3f}", len(samples)))
    default = exp(fmean(log(found.scale[template_of(one.kernel)]) for one in samples))
    expected = {
        config_key(s.kernel): scale[template_of(s.kernel)] * plain_seconds(s.kernel)
        for s in samples
    }
    settled = _settled(by_config, expected)
    return CompileTimes(
        settled, scale, round(default, 4), round(found.contention, 4), round(spread, 4)
    )


def _spread(runs: Sequence[Sequence[CompileSample]], contention: float, known: float) -> float:
    """Deviation among those who began a kernel at about one time, near what was known."""
    squares, freedom = _KNOWN_SPREAD * known**2, float(_KNOWN_SPREAD)
    for run in runs:
        kernels: dict[Kernel, list[CompileSample]] = defaultdict(list)
        for one in sorted(run, key=lambda one: one.start):
            kernels[one.kernel].append(one)
        for same in kernels.values():
            together = [one for one in same if one.start - same[0].start < _TOGETHER]
            logs = [log(_alone(one, contention)) for one in together]
            squares += _squares(logs)
            freedom += len(logs) - 1
    return sqrt(squares / freedom)


def _alone(sample: CompileSample, contention: float) -> float:
    """Seconds that the compile would have taken without company."""
    times = CompileTimes({}, {}, 1.0, contention, 0.0)
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
