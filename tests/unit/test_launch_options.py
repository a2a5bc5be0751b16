"""From a launch's options to its scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.options import LaunchOptions
from runner.bf16_fp32 import Bf16Fp32Algo
from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4, DSV4_TINY
from runner.environ import Environ
from runner.errors import UserError
from runner.scenario import Scenario
from runner.warmup import DisaggregationMode, WarmupOptions, WarmupPolicy


def scenario(environ: Environ | None = None, **values: Any) -> Scenario:
    options = LaunchOptions(**values)
    policy = WarmupPolicy.FAST
    return options.scenario(environ or Environ(), num_sms=78, policy=policy)


def test_defaults() -> None:
    assert scenario() == Scenario(
        model=DSV4, parallel=ParallelConfig(), num_sms=78,
        warmup=WarmupOptions(policy=WarmupPolicy.FAST),
    )  # fmt: skip


def test_everything() -> None:
    found = scenario(
        Environ(bf16_fp32_algo=Bf16Fp32Algo.TORCH),
        model="dsv4-tiny", layers=4, pp=2, tp=2, ep=True, attn_cp=2, stage_layers=(1, 3),
        batch_sizes=(2, 4), prompt_len=3, max_tokens=64, speculative=True,
        disaggregation=DisaggregationMode.DECODE, virtual_nodes=4, stream=(5, 6),
        cuda_graphs=(8,), walk_max_m=32, walk_memory=1.5, compile_lock=True,
    )  # fmt: skip
    assert found == Scenario(
        model=with_layers(DSV4_TINY, 4),
        parallel=ParallelConfig(
            pp=2, tp=2, ep=True, attn_cp=2, nodes=4, stage_layers=(1, 3)
        ),
        warmup=WarmupOptions(
            policy=WarmupPolicy.FAST, batch_sizes=(2, 4), disaggregation=DisaggregationMode.DECODE,
            speculative=True, graph_batch_sizes=(8,), walk_max_m=32, compile_lock=True,
        ),
        num_sms=78, prompt_len=3, bf16_fp32_algo=Bf16Fp32Algo.TORCH, max_tokens=64,
        stream=(5, 6), walk_memory=1.5 * 2**30,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("world", "local", "virtual", "nodes"),
    [(None, None, 1, 1), (None, None, 4, 4), (8, None, 1, 1), (8, 8, 1, 1), (8, 4, 1, 2),
     (8, 4, 4, 4), (8, 2, 2, 4), (1, 1, 2, 2)],
)  # fmt: skip
def test_nodes_are_torchruns_or_the_virtual_ones(
    world: int | None, local: int | None, virtual: int, nodes: int
) -> None:
    environ = Environ(world_size=world, local_world_size=local)
    options = LaunchOptions(pp=4, tp=2, virtual_nodes=virtual)
    assert options.parallel(environ) == ParallelConfig(pp=4, tp=2, nodes=nodes)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model": "dsv4-tiny", "layers": 99}, "99 layers"),
        ({"model": "dsv4-tiny", "tp": 3}, "tp=3 must divide num_attention_heads=4 of dsv4-tiny"),
        ({"model": "dsv4-tiny", "pp": 2, "virtual_nodes": 3}, "nodes=3 must divide the 2 ranks"),
        ({"model": "dsv4-tiny", "virtual_nodes": 0}, "--virtual-nodes 0 must be at least 1"),
        ({"model": "dsv4-tiny", "virtual_nodes": -1}, "--virtual-nodes -1 must be at least 1"),
        (
            {"model": "dsv4-tiny", "tp": 2, "attn_cp": 2, "cuda_graphs": (4, 3)},
            "graph batch sizes 4,3 must all be multiples of attn_cp=2",
        ),
        ({"model": "dsv4-tiny", "stream": (0,)}, "token counts 0 must all be at least 1"),
    ],
)
def test_bad_options_are_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        scenario(**values)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_may_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        scenario(model=str(tmp_path / "config.json"))
