"""When this process began."""

from __future__ import annotations

import os
import time
from pathlib import Path

_START_TIME = 21
"""Field of /proc/PID/stat, counted from 0."""


def process_start() -> float:
    """Seconds since the epoch at which the kernel started this process, to about 10 ms."""
    # The second field is the name in brackets, which may hold anything.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[_START_TIME - 2]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
