"""Start a launch's ranks on this machine with torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch.limits import lost_a_peer
from runner.errors import WorkFailedError

_SIGNALS = "SIGTERM,SIGHUP,SIGQUIT"
"""Signals on which torch ends the ranks. SIGINT is left out: it then raises KeyboardInterrupt here,
and torch sends the ranks SIGTERM, which ends them silently wherever they wait."""

_OUTER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_ranks(num_ranks: int, arguments: Sequence[str]) -> None:
    """Run ``python -m launch ARGUMENTS`` on ``num_ranks`` local ranks and wait for them.

    Raises:
        WorkFailedError: a rank failed (this has the first one's message), or a signal ended us.
        KeyboardInterrupt: the user interrupted; the ranks have ended by then.
    """
    for name in [*logging.root.manager.loggerDict]:
        # Each of these loggers sets its own level, so the parent's does not apply.
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # An outer torchrun's variables describe this one process, not the ranks it starts.
    for name in [*_OUTER, *(n for n in os.environ if n.startswith("TORCHELASTIC_"))]:
        os.environ.pop(name, None)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _SIGNALS
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    if hasattr(config, "signals_to_handle"):
        # Newer versions of torch overwrite the variable with this field.
        config.signals_to_handle = _SIGNALS
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "launch", *arguments)
    except ChildFailedError as error:
        rank, failure = _cause(error)
        code = 2 if failure.exitcode == 2 else 1
        raise WorkFailedError(_describe(rank, failure), code) from None
    except SignalException as end:
        raise WorkFailedError(f"ended by {end.sigval.name}", 128 + end.sigval) from None


def _cause(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The failure that caused the others; torch's own order is only exact to the second."""
    first = error.get_first_failure()
    for rank, failure in sorted(error.failures.items()):
        if failure.exitcode > 0 and not lost_a_peer(Exception(str(failure.message))):
            return rank, failure
    for rank, failure in sorted(error.failures.items()):
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
            return rank, failure
    return first


def _describe(rank: int, failure: ProcessFailure) -> str:
    """The rank's message, or its exit code or signal if it left none."""
    words = failure.message
    if isinstance(words, dict):
        words = words.get("message", "")
    lines = [line for line in str(words).splitlines() if line.strip()]
    if failure.error_file != "<N/A>" and lines:
        return f"rank {rank} failed: {lines[0]}"
    if failure.exitcode < 0:
        return f"rank {rank} was ended by signal {-failure.exitcode}"
    return f"rank {rank} failed with exit code {failure.exitcode}; see its output above"
