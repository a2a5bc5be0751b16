"""Setting up what ranks communicate through."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch.distributed as dist

from launch.comm import make_groups
from launch.watchdog import CommunicationTimeoutError
from runner.config.parallel import ParallelConfig


def test_ranks_that_do_not_connect_in_time_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise dist.DistStoreError("wait timeout after 1000ms, keys: /x\nframe #0")

    monkeypatch.setattr(dist, "new_group", too_late)
    with pytest.raises(CommunicationTimeoutError) as caught:
        make_groups(ParallelConfig(pp=2), 1.5)
    assert str(caught.value) == (
        "the ranks did not connect within 1.5 s, the limit of --nccl-timeout"
    )
