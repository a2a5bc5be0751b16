"""Setting up what ranks communicate through."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

pytest.importorskip("torch")

import torch.distributed as dist

from launch.comm import make_groups
from launch.watchdog import CommunicationTimeoutError
from runner.config.parallel import ParallelConfig


@pytest.mark.parametrize(
    ("link", "waited"),
    [
        ("gloo", "1.5 s, the limit of --nccl-timeout"),
        ("nccl", "31.5 s, the limit of --nccl-timeout and 30 s more"),
    ],
)
def test_ranks_that_do_not_connect_in_time_are_one_line(
    link: str, waited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise dist.DistStoreError("wait timeout after 1000ms, keys: /x\nframe #0")

    monkeypatch.setattr(dist, "new_group", too_late)
    with pytest.raises(CommunicationTimeoutError) as caught:
        make_groups(ParallelConfig(pp=2), 1.5, link)
    assert str(caught.value) == f"the ranks did not connect within {waited}"


@pytest.mark.parametrize(("link", "tensors"), [("gloo", 1.5), ("nccl", 31.5)])
def test_nccls_own_watchdog_comes_after_ours(
    link: str, tensors: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[float, str | None]] = []

    def group(*_: Any, timeout: timedelta, backend: str | None = None) -> object:
        given.append((timeout.total_seconds(), backend))
        return object()

    monkeypatch.setattr(dist, "new_group", group)
    make_groups(ParallelConfig(pp=2, tp=2), 1.5, link)
    assert given == [(tensors, None), (tensors, None), (tensors, None), (1.5, "gloo")]
