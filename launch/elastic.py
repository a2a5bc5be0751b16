"""Start a launch's ranks on this machine with torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_OUTER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankFailedError(Exception):
    """A rank failed; ``exit_code`` is what the launch should end with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start_ranks(num_ranks: int, arguments: Sequence[str]) -> None:
    """Run ``python -m launch ARGUMENTS`` on ``num_ranks`` local ranks and wait for them.

    Raises:
        RankFailedError: the first rank that failed, with its own words.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # An outer torchrun's variables describe its one worker, not our ranks.
    for name in [*_OUTER, *(n for n in os.environ if n.startswith("TORCHELASTIC_"))]:
        os.environ.pop(name, None)
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
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "launch", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = 2 if failure.exitcode == 2 else 1
        raise RankFailedError(f"rank {rank}: {failure.message.splitlines()[0]}", code) from None
