"""From a launch's options to its scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.options import LaunchOptions
from runner.cache.keys import first_recipe
from runner.config.environ import Environ
from runner.config.gemm_algo import Bf16Fp32Algo
from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4, DSV4_TINY
from runner.driver.warmup import DisaggregationMode, WarmupOptions, WarmupPolicy
from runner.errors import UserError
from runner.kernels.installed import Library
from runner.kernels.rules import RULES, RulesTable
from runner.scenario import Scenario
from runner.standin.gpus import gpu_named


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str | None]:
    """What libraries are asked for; one that is named is there, no nvcc and no tables are."""
    found: list[str | None] = []

    def find(wanted: str | None) -> Library | None:
        found.append(wanted)
        return (wanted and Library(Path("/dg"), "sgl-deep-gemm", "0.1.4.post1")) or None

    monkeypatch.setattr("launch.options.find_library", find)
    monkeypatch.setattr("launch.options.find_nvcc", lambda environ: None)
    monkeypatch.setattr("runner.kernels.table_file.BUNDLED_FOLDER", tmp_path / "tables")
    return found


def scenario(environ: Environ | None = None, **values: Any) -> Scenario:
    options = LaunchOptions(**{"num_sms": 78, **values})
    return options.scenario(environ or Environ(), policy=WarmupPolicy.FAST)


def rules_on(gpu: str, num_sms: int, **variables: Any) -> RulesTable:
    return RULES.on(gpu, num_sms, first_recipe(Environ(**variables)))


def test_defaults() -> None:
    assert scenario() == Scenario(
        model=DSV4,
        parallel=ParallelConfig(),
        num_sms=78,
        warmup=WarmupOptions(policy=WarmupPolicy.FAST),
        source=rules_on("h200", 78),
    )


def test_everything() -> None:
    found = scenario(
        Environ(bf16_fp32_algo=Bf16Fp32Algo.TORCH),
        model="dsv4-tiny",
        layers=4,
        pp=2,
        tp=2,
        ep=True,
        attn_cp=2,
        stage_layers=(1, 3),
        batch_sizes=(2, 4),
        prompt_len=3,
        max_tokens=64,
        speculative=True,
        disaggregation=DisaggregationMode.DECODE,
        virtual_nodes=4,
        stream=(5, 6),
        cuda_graphs=(8,),
        walk_max_m=32,
        walk_memory=1.5,
        compile_lock=True,
    )
    assert found == Scenario(
        model=with_layers(DSV4_TINY, 4),
        parallel=ParallelConfig(pp=2, tp=2, ep=True, attn_cp=2, nodes=4, stage_layers=(1, 3)),
        warmup=WarmupOptions(
            policy=WarmupPolicy.FAST,
            batch_sizes=(2, 4),
            disaggregation=DisaggregationMode.DECODE,
            speculative=True,
            graph_batch_sizes=(8,),
            walk_max_m=32,
            compile_lock=True,
        ),
        num_sms=78,
        prompt_len=3,
        bf16_fp32_algo=Bf16Fp32Algo.TORCH,
        max_tokens=64,
        stream=(5, 6),
        walk_memory=1.5 * 2**30,
        source=rules_on("h200", 78),
    )


def test_kernels_are_those_of_the_gpu() -> None:
    options = LaunchOptions(num_sms=78)
    made = options.scenario(Environ(), policy=WarmupPolicy.NONE, gpu=gpu_named("h100"))
    assert (made.num_sms, made.source) == (132, rules_on("h100", 132))
    h20 = LaunchOptions(gpu="h20").scenario(Environ(), policy=WarmupPolicy.NONE)
    assert (h20.num_sms, h20.source) == (78, rules_on("h20", 78))
    with pytest.raises(UserError) as caught:
        options.scenario(Environ(), policy=WarmupPolicy.NONE, gpu=gpu_named("b200"))
    assert str(caught.value) == (
        "only the library itself knows its kernels for b200 (sm_100f), and none is installed here: "
        "pip install 'deepgemm-coldstart[library]', or name one with --library (our rules cover "
        "sgl-deep-gemm 0.1.4.post1 on Hopper GPUs only)"
    )


def test_the_environment_changes_how_kernels_are_compiled() -> None:
    made = scenario(Environ(dg_jit_cpp_standard=17))
    assert made.source == rules_on("h200", 78, dg_jit_cpp_standard=17)
    assert made.source != rules_on("h200", 78)


@pytest.mark.parametrize(
    ("values", "names"),
    [({}, [None]), ({"library": "vllm"}, ["vllm"]), ({"jit": False}, [])],
)
def test_the_library_that_is_asked_for(
    values: dict[str, Any], names: list[str | None], asked: list[str | None]
) -> None:
    scenario(**values)
    assert asked == names


@pytest.mark.parametrize(
    ("world", "local", "virtual", "nodes"),
    [
        (None, None, 1, 1),
        (None, None, 4, 4),
        (8, None, 1, 1),
        (8, 8, 1, 1),
        (8, 4, 1, 2),
        (8, 4, 4, 4),
        (8, 2, 2, 4),
        (1, 1, 2, 2),
    ],
)
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
