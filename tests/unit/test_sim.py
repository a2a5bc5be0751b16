"""The simulator from scenario to figures, and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from runner.cli import cli
from runner.cli.guard import run_guarded
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV3, DSV4, DSV4_PRO, DSV4_TINY
from runner.jit.builder.cut import cut_units, makespan
from runner.jit.builder.unit import Job
from runner.jit.kernel_type import DeepGemmKernelType as T
from runner.jit.kernel_type import KernelCall
from runner.jit.kernels import kernels_of
from runner.jit.plan import GemmShape, kernel_ranges
from runner.scenario import Scenario, record, record_rank
from runner.schedule import Collective, Compute, Schedule
from runner.timeline import read_timelines
from runner.warmup import WarmupOptions, WarmupPolicy
from sim.fit import compile_tables, walk_samples
from sim.profile import Link, Profile, ProfileCosts, load_profile, tile_key
from sim.simulate import Machine, simulate

DATA = Path(__file__).parent.parent / "data" / "h200_dsv4flash_tp2.jsonl"


def scenario(policy: WarmupPolicy = WarmupPolicy.NONE, **parallel: int) -> Scenario:
    return Scenario(
        model=DSV4_TINY,
        parallel=ParallelConfig(**parallel),
        warmup=WarmupOptions(policy=policy, batch_sizes=(1, 64)),
    )


@pytest.mark.parametrize("model", [DSV4_TINY, DSV4, DSV4_PRO, DSV3], ids=lambda model: model.name)
@pytest.mark.parametrize("ep", [False, True])
def test_tensor_ranks_recorded_once_equal_those_recorded_each(model, ep: bool) -> None:  # type: ignore[no-untyped-def]
    one = Scenario(
        model=model, parallel=ParallelConfig(pp=2, tp=2, ep=ep),
        warmup=WarmupOptions(policy=WarmupPolicy.PP_PARALLEL, batch_sizes=(1, 128)),
    )  # fmt: skip
    each = Schedule(tuple(record_rank(one, rank) for rank in range(4)))
    assert record(one) == each
    assert record(one).digest == each.digest


def test_context_parallel_ranks_hold_their_part_of_the_tokens() -> None:
    ops = record(scenario(pp=2, tp=2, attn_cp=2)).ranks[0]
    gathers = {op.name for op in ops if isinstance(op, Collective) and "gather" in op.name}
    assert gathers >= {"all_gather kv", "all_gather moe tokens", "all_gather compressor"}
    dense = {op.m for op in ops if isinstance(op, KernelCall) and op.type is T.GEMM_NT_F8F8BF16}
    assert {32, 64} <= dense, "attention sees half of 64 EXTEND tokens, the shared expert all"


def test_serial_start_up_is_the_sum_of_the_stages_and_parallel_the_longest() -> None:
    machine = Machine(profile=load_profile("h200"))
    warmup = WarmupOptions(policy=WarmupPolicy.NONE, batch_sizes=(64,))
    one = replace(scenario(pp=4, tp=1, nodes=4), warmup=warmup)
    serial = simulate(one, machine).timeline
    parallel = simulate(one.with_policy(WarmupPolicy.PP_PARALLEL), machine).timeline
    assert serial.kernels_compiled == parallel.kernels_compiled
    assert serial.compile_seconds == pytest.approx(parallel.compile_seconds)
    assert serial.wall > serial.compile_seconds
    longest = max(totals.compile for totals in parallel.totals())
    assert longest < parallel.wall < longest + 3.0


def test_ranks_of_a_node_share_its_disk() -> None:
    machine = Machine(profile=load_profile("h200"))
    shared = simulate(scenario(pp=4, tp=1, nodes=1), machine).timeline
    apart = simulate(scenario(pp=4, tp=1, nodes=4), machine).timeline
    assert shared.duplicates == 0
    assert apart.kernels_compiled > shared.kernels_compiled == apart.distinct_kernels


def test_every_kernel_of_the_schedule_is_compiled_and_no_other() -> None:
    one = scenario(WarmupPolicy.PP_PARALLEL, pp=2, tp=2)
    needed = {
        kernel.identity
        for ops in record(one).ranks
        for op in ops
        if isinstance(op, KernelCall)
        for kernel in kernels_of(op)
    }
    timeline = simulate(one, Machine(profile=load_profile("h200"))).timeline
    assert {span.key for span in timeline.spans if span.kind == "compile"} == needed


def test_a_short_limit_is_a_timeout() -> None:
    machine = Machine(profile=load_profile("h200"), nccl_timeout=5.0)
    lost = simulate(scenario(pp=4, tp=1), machine).timeout
    assert lost is not None
    assert lost.rank > 0 and lost.operation == "recv hidden_states" and lost.needed > 5


# -- costs ----------------------------------------------------------------------------------------


def profile(**changes: object) -> Profile:
    base = Profile(
        name="round", num_sms=132, cores_per_node=4, compile_by_tile={}, compile_by_name={},
        compile_default=3.0, build_scale=2.0, build_start=1.0, verify=0.25, load=0.5, call=1.0,
        fp8_flops=1e12, bf16_flops=1e11,
        memory_bandwidth=1e9, links={"x": Link(1.0, 100.0)}, provenance=[],
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def test_compile_times_are_looked_up_by_tile_then_template_then_mean() -> None:
    _, gemm = kernels_of(KernelCall(T.GEMM_NT_F8F8BF16, 1, 1536, 4096, 1, 132))
    assert tile_key(gemm) == "sm90_fp8_gemm_1d2d 16x16"
    link = Link(1.0, 100.0)
    assert ProfileCosts(profile(), link).compile_seconds(gemm) == 3.0
    by_name = {"sm90_fp8_gemm_1d2d": 4.0}
    assert ProfileCosts(profile(compile_by_name=by_name), link).compile_seconds(gemm) == 4.0
    by_tile = {"sm90_fp8_gemm_1d2d 16x16": 5.0}
    costs = ProfileCosts(profile(compile_by_name=by_name, compile_by_tile=by_tile), link)
    assert costs.compile_seconds(gemm) == 5.0


def test_masked_and_dense_gemms_of_one_tile_share_a_key() -> None:
    _, masked = kernels_of(KernelCall(T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 1, 2048, 4096, 256, 132))
    assert tile_key(masked).startswith("sm90_fp8_gemm_1d2d ")


def test_compute_is_bound_by_flops_or_bytes_and_shared_between_ranks() -> None:
    costs = ProfileCosts(profile(), Link(1.0, 100.0))
    assert costs.compute_seconds(Compute("x", int(4e11), 0)) == 1.0 + 4.0
    assert costs.compute_seconds(Compute("x", 0, int(2e9))) == 1.0 + 2.0
    crowded = ProfileCosts(profile(), Link(1.0, 100.0), ranks_per_gpu=8)
    assert crowded.compute_seconds(Compute("x", 0, int(2e9))) == 1.0 + 16.0


def test_collectives_move_what_a_ring_moves() -> None:
    costs = ProfileCosts(profile(), Link(1.0, 100.0))
    assert costs.collective_seconds(Collective("all_reduce x", (0, 1, 2, 3), 100)) == 2.5
    assert costs.collective_seconds(Collective("all_gather x", (0, 1, 2, 3), 100)) == 4.0
    assert costs.transfer_seconds(300) == 4.0


def test_tables_are_means() -> None:
    _, gemm = kernels_of(KernelCall(T.GEMM_NT_F8F8BF16, 1, 1536, 4096, 1, 132))
    tables = compile_tables([(gemm, 2.0), (gemm, 4.0)])
    assert tables["compile_by_tile"] == {"sm90_fp8_gemm_1d2d 16x16": 3.0}
    assert tables["compile_default"] == 3.0


def test_walk_files_give_one_sample_per_compile() -> None:
    lines = [json.loads(line) for line in DATA.read_text().splitlines()]
    assert len(walk_samples(DATA)) == sum(len(line["compiles"]) for line in lines) == 104


# -- command line ---------------------------------------------------------------------------------


def sim(*arguments: str) -> int:
    return run_guarded(cli, ["sim", *arguments], program="runner")


def test_json_on_stdout_is_only_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert sim("--model", "dsv4-tiny", "--batch-sizes", "1", "--json", "-") == 0
    data = json.loads(capsys.readouterr().out)
    assert [p["policy"] for p in data["predictions"]] == ["none", "pp-parallel", "planned"]
    assert data["predictions"][0]["timeout"] is None
    assert len(data["predictions"][0]["ranks"]) == 8


def test_timelines_are_written_and_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    assert sim("--model", "dsv4-tiny", "--batch-sizes", "1", "--timeline", str(path)) == 0
    assert [t.source for t in read_timelines(path)] == ["predicted"] * 3
    assert run_guarded(cli, ["compare", str(path), str(path)], program="runner") == 0


def test_the_summary_says_what_is_saved(capsys: pytest.CaptureFixture[str]) -> None:
    assert sim("--model", "dsv4-tiny", "--batch-sizes", "1", "--nccl-timeout", "5") == 0
    out = capsys.readouterr().out
    assert "times as fast" in out and "% less" in out
    assert "the watchdog ends this run at" in out


BAD = {
    "--model nothing": "'nothing'",
    "--pp 99": "pp=99 stages need at least as many layers: the model has 43",
    "--tp 3": "tp=3 must divide num_attention_heads=64 of dsv4",
    "--hardware abacus": "hardware 'abacus' is not known: use one of",
    "--link string": "--link 'string' is not in profile h200: use one of",
    "--cores 0": "--cores 0 must be above 0",
    "--nodes 0": "nodes=0 must be at least 1",
    "--nccl-timeout nan": "not a number of seconds",
    "--nccl-timeout 0": "0.0 is not in the range",
    "--prompt-len 0": "prompt_len=0",
    "--plot x.gif": "suffix must be one of .png, .svg",
    "--trace -": "--trace and --plot need a file",
    "--json - --timeline -": "only one output can go to standard output",
    "--nodes 3": "nodes=3 must divide the 8 ranks",
    "--timeline /nonexistent/x.json": "cannot write /nonexistent/x.json: its folder does not exist",
    "--batch-sizes 1,b": "'1,b' is not a list of integers",
    "--warmup slow": "'slow'",
}


@pytest.mark.parametrize("arguments", BAD, ids=lambda text: text.replace(" ", "_"))
def test_bad_input(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sim(*arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and BAD[arguments] in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["\xff", "[]", "{}", "3", '{"name": "x"}', None], ids=lambda text: repr(text)[:12]
)
def test_a_bad_profile_file_is_one_line(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.json"
    good = (Path(__file__).parents[2] / "sim" / "profiles" / "h200.json").read_text()
    wrong = good.replace('"load": 0.0012', '"load": "x"') if text is None else text
    path.write_bytes(wrong.encode("latin-1"))
    assert sim("--hardware", str(path)) == 2
    err = capsys.readouterr().err
    assert f"{path} is not a hardware profile" in err and err.count("\n") == 1


def test_a_prefill_node_is_foretold_without_decode(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "dsv4-tiny", "--batch-sizes", "1", "--json", "-"]
    assert sim(*arguments, "--disaggregation-mode", "prefill") == 0
    prefill = json.loads(capsys.readouterr().out)["predictions"][0]
    assert sim(*arguments) == 0
    both = json.loads(capsys.readouterr().out)["predictions"][0]
    assert prefill["kernels_compiled"] < both["kernels_compiled"]


def test_no_command_of_runner_imports_torch_or_numpy() -> None:
    code = (
        "import sys; from runner.cli import cli; from runner.cli.guard import run_guarded\n"
        "run_guarded(cli, ['sim', '--model', 'dsv4-tiny'], program='runner')\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_no_subcommand() -> None:
    code = (
        "import sys; from runner.cli import cli; from runner.cli.guard import run_guarded\n"
        "run_guarded(cli, ['--help'], program='runner')\n"
        "assert not {'rich', 'sim', 'runner.model'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_build_is_the_builders_own_schedule_on_this_machine() -> None:
    profile = Profile(
        name="round", num_sms=132, cores_per_node=4, compile_by_tile={}, compile_by_name={},
        compile_default=3.0, build_scale=2.0, build_start=1.0, verify=0.25, load=0.5, call=1.0,
        fp8_flops=1e12, bf16_flops=1e11, memory_bandwidth=1e9, links={"x": Link(1.0, 100.0)},
        provenance=[],
    )  # fmt: skip
    costs = ProfileCosts(profile, profile.links["x"])
    shape = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 1024, 1, 132)
    kernels = list(kernel_ranges(shape, range(1, 2049)))
    spans = costs.build_spans(kernels, 4)
    units = cut_units([Job("", kernel, "") for kernel in kernels], 4)
    assert sorted(k.identity for k, _, _ in spans if k) == sorted(k.identity for k in kernels)
    assert sum(kernel is None for kernel, _, _ in spans) == len(units)
    assert min(start for _, start, _ in spans) == 1.0
    assert max(end for _, _, end in spans) == pytest.approx(1.0 + 2.0 * makespan(units, 4))
    assert costs.build_spans([], 4) == []
