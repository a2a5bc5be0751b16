"""Logits of a launch, and the rank that keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from launch.logits import Logits
from runner.config.parallel import ParallelConfig
from runner.errors import UserError

MADE = torch.tensor([[1.0, -2.5]], dtype=torch.bfloat16)


def test_the_last_stages_first_rank_keeps_them(tmp_path: Path) -> None:
    parallel = ParallelConfig(pp=2, tp=2)
    kept = [Logits.of_rank(tmp_path / "x.pt", parallel, rank).path for rank in range(4)]
    assert kept == [None, None, tmp_path / "x.pt", None]
    assert Logits.of_rank(None, parallel, 2).path is None


def test_each_forwards_come_back_as_fp32(tmp_path: Path) -> None:
    logits = Logits(tmp_path / "x.pt")
    for made in (MADE, "shapes alone", None, -MADE):
        logits.keep(made)
    logits.save()
    first, second = torch.load(tmp_path / "x.pt")
    assert torch.equal(first, MADE.float())
    assert torch.equal(second, -MADE.float())
    assert first.dtype == torch.float32


def test_without_logits_there_is_no_file(tmp_path: Path) -> None:
    Logits(tmp_path / "x.pt").save()
    nowhere = Logits(None)
    nowhere.keep(MADE)
    nowhere.save()
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    logits = Logits(tmp_path / "none" / "x.pt")
    logits.keep(MADE)
    with pytest.raises(UserError, match=r"cannot write .*none/x\.pt"):
        logits.save()
