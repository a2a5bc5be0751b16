"""Machines that are faster or slower at first than they are on average.

A shared machine changes by the minute: what a look at it tells holds for a moment and less and
less from there on. Its speed at ``t`` seconds, against the profile's, is taken to be
``1 + (1 / factor - 1) * exp(-t / settling)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import expm1

from runner.timeline import Timeline
from sim.calibration.fitting import crossing

PAUSE = "weights"
"""The phase that a GPU or a disk, not a CPU, is what takes the time of."""


@dataclass(frozen=True)
class Drift:
    """How the time of a run goes by against a profile's.

    Attributes:
        factor: how many times as long the CPUs take at the run's start.
        settling: seconds after which a third (1 / e) of the difference is left.
        pause: start and end, in the run's time, of what the CPUs have no part in.
    """

    factor: float
    settling: float
    pause: tuple[float, float] = (0.0, 0.0)

    def nominal(self, time: float) -> float:
        """Seconds that the profile's machine takes for what this one has done at ``time``."""
        start, end = self.pause
        if time <= start:
            return self._worked(time)
        before = self._worked(start)
        if time <= end:
            return before + time - start
        return before + end - start + self._worked(time) - self._worked(end)

    def real(self, nominal: float) -> float:
        """When this machine has done what takes the profile's ``nominal`` seconds."""
        if self.factor == 1.0:
            return nominal
        slowest = max(self.factor, 1.0)
        return crossing(lambda time: self.nominal(time) - nominal, 0.0, nominal * slowest)

    def _worked(self, time: float) -> float:
        gained = (1 / self.factor - 1) * self.settling
        return time + gained * -expm1(-time / self.settling)


def drifted(timeline: Timeline, drift: Drift, phases: Iterable[tuple[str, float]]) -> Timeline:
    """A predicted run, its seconds the profile's, as it goes by on a machine that drifts.

    Args:
        timeline: the run.
        drift: the machine.
        phases: names and nominal seconds of what comes before the warm-up.
    """
    at = 0.0
    for name, seconds in phases:
        if name == PAUSE:
            start = drift.real(at)
            drift = replace(drift, pause=(start, start + seconds))
        at += seconds
    return timeline.moved(drift.real)


def undrifted(timeline: Timeline, drift: Drift) -> Timeline:
    """A measured run as it would have been on the profile's machine."""
    if drift.factor == 1.0:
        return timeline
    weights = [s for s in timeline.spans if s.kind == "phase" and s.name == PAUSE]
    if weights:
        pause = min(span.start for span in weights), max(span.end for span in weights)
        drift = replace(drift, pause=pause)
    return timeline.moved(drift.nominal)
