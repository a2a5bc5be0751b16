"""Fit compile times to measured compiles: by configuration, by template, and by contention."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import exp, log
from statistics import fmean

from sim.calibration.data import CompileSample
from sim.calibration.fitting import minimum
from sim.costs.profile import CompileTimes
from sim.costs.profile_costs import slowdown

_MOST_CONTENTION = 4.0
_EXPECTED_SAMPLES = 0.5
"""Weight, in samples, of the time that a configuration's code size predicts."""

_KNOWN_CONTENTION = 1.0
"""Weight of the known contention: as much as a hundred compiles that are off by 10 %."""


def fit_compile_times(
    runs: Sequence[Sequence[CompileSample]],
    base: CompileTimes,
    note: Callable[[str, str, int], None],
) -> CompileTimes:
    """Fit compile times to the compiles of each run; values that no run gives come from ``base``.

    The contention is chosen so that compiles within each run agree best, since machines differ
    between runs. Scales are geometric means per template, and seconds per configuration.
    """
    samples = list(chain.from_iterable(runs))
    if not samples:
        return base
    contention = minimum(lambda value: _disagreement(runs, base, value), 0.0, _MOST_CONTENTION)
    alone = replace(base, contention=contention)
    logs = _log_scales(samples, alone)
    scale = {name: round(exp(logs[name]), 4) for name in sorted(logs)}
    default = exp(fmean(log(scale[sample.template]) for sample in samples))
    by_config = _config_seconds(samples, alone, scale)
    note("compile contention", f"{contention:.3f}", len(samples))
    note("compile seconds, by configuration", f"{len(by_config)} of them", len(samples))
    counts = Counter(sample.template for sample in samples)
    for name, value in scale.items():
        note(f"compile scale {name}", f"{value:.3f}", counts[name])
    return CompileTimes(
        by_config=by_config,
        scale={**base.scale, **scale},
        default_scale=round(default, 4),
        contention=round(contention, 4),
    )


def _config_seconds(
    samples: Iterable[CompileSample], alone: CompileTimes, scale: Mapping[str, float]
) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    expected = {}
    for one in samples:
        found[one.config].append(_log_seconds(one, alone))
        expected[one.config] = log(scale[one.template] * one.plain)
    weight = _EXPECTED_SAMPLES
    return {
        config: round(exp((sum(logs) + weight * expected[config]) / (len(logs) + weight)), 4)
        for config, logs in sorted(found.items())
    }


def _disagreement(
    runs: Iterable[Sequence[CompileSample]], base: CompileTimes, contention: float
) -> float:
    """Sum of squared deviations from the means of the runs and templates."""
    alone = replace(base, contention=contention)
    scales = _log_scales(chain.from_iterable(runs), alone)
    total = _KNOWN_CONTENTION * (contention - base.contention) ** 2
    for run in filter(None, runs):
        left = [_log_seconds(one, alone) - log(one.plain) - scales[one.template] for one in run]
        middle = fmean(left)
        total += sum((value - middle) ** 2 for value in left)
    return total


def _log_scales(samples: Iterable[CompileSample], times: CompileTimes) -> dict[str, float]:
    ratios: dict[str, list[float]] = defaultdict(list)
    for one in samples:
        ratios[one.template].append(_log_seconds(one, times) - log(one.plain))
    return {template: fmean(values) for template, values in ratios.items()}


def _log_seconds(sample: CompileSample, times: CompileTimes) -> float:
    """Log of the seconds that the compile would have taken alone."""
    low = int(sample.concurrency)
    share = sample.concurrency - low
    slow = (1 - share) * slowdown(times, max(low, 1), sample.cores)
    slow += share * slowdown(times, low + 1, sample.cores)
    return log(sample.seconds / slow)
