"""launch's command line: the scenario, options passed to ranks, and invalid options."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from launch.cli import RankFiles, main
from launch.jit import cache_of_policy
from launch.options import LaunchOptions, RunOptions, check_options
from runner.config.environ import Environ
from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV4, DSV4_TINY
from runner.config.warmup import DisaggregationMode, WarmupPolicy
from runner.errors import UserError
from runner.kernels.installed import Library
from runner.kernels.keys import first_recipe
from runner.kernels.rules import RULES, RulesTable
from runner.options import (
    PolicyOptions,
    ReportOptions,
    ScenarioOptions,
    scenario_options,
    with_options,
)
from runner.scenario import Scenario
from runner.standin.gpus import gpu_named
from runner.target import LibraryOptions


@pytest.fixture(autouse=True)
def requested_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str | None]:
    """Collects requested libraries. Only a named one is found; there is no nvcc and no table."""
    found: list[str | None] = []

    def find(wanted: str | None) -> Library | None:
        found.append(wanted)
        return (wanted and Library(Path("/dg"), "sgl-deep-gemm", "0.1.4.post1")) or None

    monkeypatch.setattr("runner.target.find_library", find)
    monkeypatch.setattr("runner.target.find_nvcc", lambda environ: None)
    monkeypatch.setattr("runner.kernels.table_file.BUNDLED_FOLDER", tmp_path / "tables")
    return found


def parsed(*arguments: str) -> LaunchOptions:
    """The options that the command receives."""
    found: list[LaunchOptions] = []

    @click.command()
    @with_options(
        scenario_options("model", "deployment", "run"),
        LibraryOptions,
        PolicyOptions,
        RunOptions,
        ReportOptions,
        RankFiles,
    )
    def command(
        given: ScenarioOptions,
        kernels: LibraryOptions,
        policies: PolicyOptions,
        run: RunOptions,
        files: ReportOptions,
        rank_files: RankFiles,
    ) -> None:
        found.append(
            LaunchOptions(
                **vars(run), given=given, kernels=kernels, policies=policies.warmup, files=files
            )
        )

    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    if result.exit_code:
        raise UserError(result.output.splitlines()[-1])
    return found[0]


def scenario(*arguments: str, environ: Environ | None = None) -> Scenario:
    options = parsed("--num-sms", "78", *arguments)
    return options.scenario(environ or Environ(), policy=WarmupPolicy.FAST)


def rules_on(gpu: str, num_sms: int, cpp_standard: int = 20) -> RulesTable:
    return RULES.on(gpu, num_sms, first_recipe(Environ(dg_jit_cpp_standard=cpp_standard)))


def test_default_scenario() -> None:
    assert scenario() == Scenario(
        model=DSV4, num_sms=78, policy=WarmupPolicy.FAST, source=rules_on("h200", 78)
    )


EVERYTHING = (
    "--model dsv4-tiny --layers 4 --pp 2 --tp 2 --ep --attn-cp 2 --stage-layers 1,3 "
    "--batch-sizes 2,4 --prompt-len 3 --max-tokens 64 --speculative --disaggregation-mode "
    "decode --stream 5,6 --cuda-graphs 8 --walk-max-m 32 --walk-memory 1.5 --compile-lock "
    "--virtual-nodes 4 --num-sms 78"
)


def test_scenario_from_all_options() -> None:
    assert scenario(*EVERYTHING.split()) == Scenario(
        model=with_layers(DSV4_TINY, 4),
        parallel=ParallelConfig(pp=2, tp=2, ep=True, attn_cp=2, nodes=4, stage_layers=(1, 3)),
        policy=WarmupPolicy.FAST,
        batch_sizes=(2, 4),
        disaggregation=DisaggregationMode.DECODE,
        speculative=True,
        graph_batch_sizes=(8,),
        walk_max_m=32,
        compile_lock=True,
        num_sms=78,
        prompt_len=3,
        max_tokens=64,
        stream=(5, 6),
        walk_memory=1.5 * 2**30,
        source=rules_on("h200", 78),
    )


def test_argv_for_ranks_gives_the_same_options_except_timeline_files() -> None:
    rest = (
        "--warmup fast --warmup planned --library vllm --gpu h20 --compute skip --no-jit "
        "--device cpu --backend gloo --cache-dir /a/b --seed 7 --timeout 60 --nccl-timeout "
        "5.5 --logits x.pt --schedule y.json"
    )
    options = parsed(*EVERYTHING.split(), *rest.split())
    assert parsed(*options.to_argv()) == options
    # Only the parent writes Timeline files.
    assert parsed(*parsed("--timeline", "t.json").to_argv()).files == ReportOptions()


def test_detected_gpu_determines_sm_count_and_rules() -> None:
    options = parsed("--num-sms", "78")
    made = options.scenario(Environ(), policy=WarmupPolicy.NONE, gpu=gpu_named("h100"))
    assert (made.num_sms, made.source) == (132, rules_on("h100", 132))
    h20 = parsed("--gpu", "h20").scenario(Environ(), policy=WarmupPolicy.NONE)
    assert (h20.num_sms, h20.source) == (78, rules_on("h20", 78))
    with pytest.raises(UserError) as caught:
        options.scenario(Environ(), policy=WarmupPolicy.NONE, gpu=gpu_named("b200"))
    assert str(caught.value) == (
        "only the library itself knows its kernels for b200 (sm_100f), and none is installed here: "
        "pip install 'deepgemm-coldstart[library]', or give one with --library (our rules cover "
        "sgl-deep-gemm 0.1.4.post1 on Hopper GPUs only)"
    )


def test_environment_changes_compile_flags() -> None:
    made = scenario(environ=Environ(dg_jit_cpp_standard=17))
    assert made.source == rules_on("h200", 78, cpp_standard=17)
    assert made.source != rules_on("h200", 78)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [([], [None]), (["--library", "vllm"], ["vllm"]), (["--no-jit"], [])],
)
def test_library_option_determines_the_requested_library(
    arguments: list[str], names: list[str | None], requested_libraries: list[str | None]
) -> None:
    scenario(*arguments)
    assert requested_libraries == names


@pytest.mark.parametrize(
    ("world", "local", "virtual", "nodes"),
    [
        (1, None, 1, 1),
        (1, None, 4, 4),
        (8, None, 1, 1),
        (8, 8, 1, 1),
        (8, 4, 1, 2),
        (8, 4, 4, 4),
        (8, 2, 2, 4),
        (1, 1, 2, 2),
    ],
)
def test_nodes_come_from_torchrun_or_virtual_nodes(
    world: int | None, local: int | None, virtual: int, nodes: int
) -> None:
    environ = Environ(world_size=world, local_world_size=local)
    arguments = ["--pp", "4", "--tp", "2", "--virtual-nodes", str(virtual)]
    assert scenario(*arguments, environ=environ).parallel == ParallelConfig(pp=4, tp=2, nodes=nodes)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--layers 99", "layers=99 of dsv4-tiny must lie in 1..8"),
        ("--tp 3", "tp=3 must divide num_attention_heads=4 of dsv4-tiny"),
        ("--pp 2 --virtual-nodes 3", "nodes=3 must divide the 2 ranks"),
        ("--virtual-nodes 0", "0 is not in the range x>=1"),
        (
            "--tp 2 --attn-cp 2 --cuda-graphs 4,3",
            "graph batch sizes 4,3 must all be multiples of attn_cp=2",
        ),
        ("--stream 0", "'0' must be whole numbers from 1 on"),
    ],
)
def test_invalid_scenario_option_is_a_one_line_error(arguments: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        scenario("--model", "dsv4-tiny", *arguments.split())
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--num-sms 7", "--num-sms 7 must be a positive even number"),
        ("--nccl-timeout 0.5", "--nccl-timeout 0.5 must be at least 1"),
        ("--backend nccl --compute skip", "without math nothing is on a GPU"),
        ("--timeline -", "--timeline needs a file"),
        (
            "--warmup none --warmup fast --logits x",
            "--logits x can hold only one run: give one --warmup with it",
        ),
    ],
)
def test_conflicting_options_are_refused(arguments: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_options(parsed(*arguments.split()))
    assert line in str(caught.value)


def test_model_option_may_be_a_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        scenario("--model", str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        ("--warmup none", False),
        ("--warmup none --warmup full", True),
        ("--warmup none --probe", True),
        ("--warmup none --pp 2", True),
    ],
)
def test_single_rank_runs_in_this_process_unless_several_runs_or_a_probe_are_needed(
    words: str, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several policies, a probe or several ranks need a process that starts the ranks."""
    called: list[str] = []
    for name in ("_be_a_rank", "_start_ranks"):
        monkeypatch.setattr(f"launch.cli.{name}", lambda *_, name=name: called.append(name))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["--model", "dsv4-tiny", "--no-jit", *words.split()]) == 0
    assert called == ["_start_ranks" if starts else "_be_a_rank"]


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
@pytest.mark.parametrize("flag", ["--timeout", "--nccl-timeout", "--walk-memory", "--probed"])
def test_numeric_options_must_be_finite_and_positive(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "dsv4-tiny", "--no-jit", flag, value]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: Invalid value for '{flag}'") and err.count("\n") == 1


def test_each_of_several_policies_writes_to_its_own_subdirectory(tmp_path: Path) -> None:
    """Read-only directories are shared; ``prebuilt`` uses the cache directory itself."""
    own, shared = tmp_path / "own", tmp_path / "shared"
    both = parsed("--cache-dir", f"{own}:{shared}", "--warmup", "none", "--warmup", "prebuilt")
    none, prebuilt = (cache_of_policy(both, Environ(), policy) for policy in both.policies)
    assert str(none) == f"{own}/none:{shared}"
    assert str(prebuilt) == f"{own}:{shared}"
    assert cache_of_policy(parsed("--warmup", "none"), Environ(), WarmupPolicy.NONE) is None
