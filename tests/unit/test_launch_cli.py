"""The launch's command line, and the one that it gives the ranks which it starts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from launch.cli import _arguments, launch, main
from launch.options import LaunchOptions
from runner.config.warmup import DisaggregationMode, WarmupPolicy

EVERYTHING: dict[str, Any] = {
    "model": "dsv4-tiny",
    "layers": 4,
    "pp": 2,
    "tp": 4,
    "ep": True,
    "attn_cp": 2,
    "stage_layers": (1, 3),
    "policies": (WarmupPolicy.PP_PARALLEL_FAST,),
    "batch_sizes": (2, 4),
    "prompt_len": 3,
    "max_tokens": 64,
    "disaggregation": DisaggregationMode.DECODE,
    "speculative": True,
    "compute": "skip",
    "jit": False,
    "device": "cpu",
    "backend": "gloo",
    "gpu": "h20",
    "num_sms": 78,
    "library": "vllm",
    "virtual_nodes": 4,
    "stream": (5, 6),
    "cuda_graphs": (8,),
    "walk_max_m": 32,
    "walk_memory": 1.5,
    "compile_lock": True,
    "nccl_timeout": 2.5,
    "cache_dir": Path("a cache"),
    "seed": 7,
    "timeout": 60.0,
    "logits": Path("logits.pt"),
    "schedule": Path("schedule.json"),
    "probed": 1.25,
    "moe_a2a": True,
    "overlap": ("deepseek-decode", "mine.toml"),
}
OF_THE_PARENT = {"timeline", "trace", "plot", "probe"}
"""What the process that starts the ranks does itself."""


def parsed(words: list[str]) -> LaunchOptions:
    values = dict(launch.make_context("launch", list(words)).params)
    for hidden in ("result", "work_dir"):
        assert values.pop(hidden) is None
    assert not values["probe"]
    return LaunchOptions(
        policies=tuple(WarmupPolicy(name) for name in values.pop("policies")),
        disaggregation=DisaggregationMode(values.pop("disaggregation_mode")),
        **values,
    )


def test_every_option_is_among_these() -> None:
    assert {item.name for item in fields(LaunchOptions)} == {*EVERYTHING, *OF_THE_PARENT}
    plain = LaunchOptions()
    assert all(value != getattr(plain, name) for name, value in EVERYTHING.items())


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_ranks_are_given_what_the_launch_was(values: dict[str, Any]) -> None:
    options = LaunchOptions(**values)
    assert parsed(_arguments(options)) == options


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_option_is_handed_on(name: str) -> None:
    options = LaunchOptions(**{name: EVERYTHING[name]})
    assert parsed(_arguments(options)) == options


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        ("--warmup none", False),
        ("--warmup none --warmup full", True),
        ("--warmup none --probe", True),
        ("--warmup none --pp 2", True),
    ],
)
def test_one_rank_runs_here_unless_there_is_more_to_do(
    words: str, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several policies, or a probe before the run, take a process that starts the ranks."""
    called: list[str] = []
    for name in ("_be_a_rank", "_start_ranks"):
        monkeypatch.setattr(f"launch.cli.{name}", lambda *_, name=name: called.append(name))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["--model", "dsv4-tiny", "--no-jit", *words.split()]) == 0
    assert called == ["_start_ranks" if starts else "_be_a_rank"]


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
@pytest.mark.parametrize("flag", ["--timeout", "--nccl-timeout", "--walk-memory", "--probed"])
def test_numbers_are_finite_and_above_0(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "dsv4-tiny", "--no-jit", flag, value]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: Invalid value for '{flag}'") and err.count("\n") == 1


def test_a_limit_in_which_no_ranks_could_connect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "dsv4-tiny", "--no-jit", "--nccl-timeout", "0.01"]) == 2
    assert capsys.readouterr().err == (
        "error: --nccl-timeout 0.01 must be at least 1: ranks need some time to connect\n"
    )
