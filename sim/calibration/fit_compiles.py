"""Compile times fitted to measured compiles: by configuration, by template, and by contention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from math import exp, log
from statistics import fmean

from runner.build.estimates import plain_seconds
from sim.calibration.data import CompileSample
from sim.calibration.fitting import minimum
from sim.costs.compile_time import config_key, slowdown, template_of
from sim.costs.profile import CompileTimes

_MOST_CONTENTION = 4.0
_EXPECTED_SAMPLES = 0.5
"""What a kernel's size lets expect of its configuration counts as half a sample."""

_KNOWN_CONTENTION = 1.0
"""Weight of the contention known before: as much as a hundred compiles that are off by 10 %."""


def fit_compile_times(
    runs: Sequence[Sequence[CompileSample]],
    base: CompileTimes,
    note: Callable[[str, str, int], None],
) -> CompileTimes:
    """Fit compile times to the compiles of runs.

    The contention is the one that makes compiles within each run agree best: between runs the
    machine differs. Scales are geometric means over a template, seconds over a configuration.

    Args:
        runs: the compiles of each run.
        base: what was known before.
        note: called with the name, value and number of samples of each figure.
    """
    samples = list(chain.from_iterable(runs))
    if not samples:
        return base
    plain = {sample.kernel: plain_seconds(sample.kernel) for sample in samples}
    template = {sample.kernel: template_of(sample.kernel) for sample in samples}

    def disagreement(contention: float) -> float:
        means = log_scales(contention)
        total = _KNOWN_CONTENTION * (contention - base.contention) ** 2
        for run in filter(None, runs):
            left = [log_ratio(one, contention) - means[template[one.kernel]] for one in run]
            middle = fmean(left)
            total += sum((value - middle) ** 2 for value in left)
        return total

    def log_scales(contention: float) -> dict[str, float]:
        ratios: dict[str, list[float]] = defaultdict(list)
        for one in samples:
            ratios[template[one.kernel]].append(log_ratio(one, contention))
        return {name: fmean(values) for name, values in sorted(ratios.items())}

    def log_ratio(one: CompileSample, contention: float) -> float:
        return log(_seconds_alone(one, contention, base) / plain[one.kernel])

    contention = minimum(disagreement, 0.0, _MOST_CONTENTION)
    scale = {name: round(exp(value), 4) for name, value in log_scales(contention).items()}
    default = exp(fmean(log(scale[template[one.kernel]]) for one in samples))

    by_config: dict[str, list[float]] = defaultdict(list)
    expected = {}
    for one in samples:
        key = config_key(one.kernel)
        by_config[key].append(log(_seconds_alone(one, contention, base)))
        expected[key] = log(scale[template[one.kernel]] * plain[one.kernel])
    seconds = {
        key: exp((sum(logs) + _EXPECTED_SAMPLES * expected[key]) / (len(logs) + _EXPECTED_SAMPLES))
        for key, logs in sorted(by_config.items())
    }

    note("compile contention", f"{contention:.3f}", len(samples))
    note("compile seconds, by configuration", f"{len(by_config)} of them", len(samples))
    for name, value in scale.items():
        count = sum(template[one.kernel] == name for one in samples)
        note(f"compile scale {name}", f"{value:.3f}", count)
    return replace(
        base,
        by_config={key: round(value, 4) for key, value in seconds.items()},
        scale={**base.scale, **scale},
        default_scale=round(default, 4),
        contention=round(contention, 4),
    )


def _seconds_alone(sample: CompileSample, contention: float, base: CompileTimes) -> float:
    """Seconds that the compile would have taken with no other at the same time."""
    times = replace(base, contention=contention)
    low = int(sample.concurrency)
    share = sample.concurrency - low
    slow = (1 - share) * slowdown(times, max(low, 1), sample.cores)
    slow += share * slowdown(times, low + 1, sample.cores)
    return sample.seconds / slow
