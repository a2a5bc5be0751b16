"""What ends a rank that waits too long for another, and says for whom."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from pathlib import Path

import torch

from launch.deadline import OutOfTimeError
from runner.schedule import Begin, Collective, Recv, Send
from runner.watch.shim import read_unfinished

Communication = Collective | Begin | Send | Recv

_POLL = 2e-4
_TIMEOUT_WORDS = (
    "Timed out waiting",
    "Operation timed out!",
    "Application timeout caused pair closure",
    "timed out after",
    "wait timeout after",
    "Wait timeout",
    "Timeout waiting for key",
)
"""What gloo and torch's stores say of a wait that was too long."""


class CommunicationTimeoutError(OutOfTimeError):
    """A communication took longer than the limit."""


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, leaving the core to others meanwhile."""
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    while not done.query():
        time.sleep(_POLL)


def is_timeout(error: Exception) -> bool:
    """Whether an error of torch.distributed says that a wait was too long."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TIMEOUT_WORDS)


def describe_timeout(
    op: Communication, rank: int, limit: float, log_dir: Path, *, here: Container[int]
) -> CommunicationTimeoutError:
    """The error that names the operation, whom it waits for and who compiles what just now.

    Where none of those compile, they wait for others themselves.

    Args:
        op: what took too long.
        rank: the rank that waited.
        limit: for how many seconds.
        log_dir: where the compiles of this host are noted.
        here: the ranks of this host; what others do is not seen from it.
    """
    others = [peer for peer in _peers(op) if peer != rank]
    running = [record for record in read_unfinished(log_dir) if record.rank >= 0]
    busy = {record.rank: record.kernel_name for record in running}
    near = {peer: name for peer, name in busy.items() if peer in others}
    words = "; ".join(f"rank {peer} compiles {name}" for peer, name in (near or busy).items())
    if not near:
        words = ", but ".join(filter(None, (_unseen(others, here), words)))
    waited = f"{op.name} waited {limit:g} s for {_ranks(others)}, the limit of --nccl-timeout"
    return CommunicationTimeoutError(f"{waited}: {words}")


def _unseen(others: Sequence[int], here: Container[int]) -> str:
    away = [peer for peer in others if peer not in here]
    if not away:
        return "none of them is compiling"
    return f"{_ranks(away)} cannot be seen from this host"


def _peers(op: Communication) -> Sequence[int]:
    return op.group if isinstance(op, Collective | Begin) else (op.peer,)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
