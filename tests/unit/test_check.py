"""``runner plan``: its output, ``--check`` against the library's answers, invalid input."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cli import main
from runner.errors import UserError
from runner.kernels.describe import config_of
from runner.kernels.installed import Library
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES, kernels_of, transpose_fp32
from runner.kernels.table import Demand, Origin, RecordedTable, Run, Source, merge_tables
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape
from runner.planning.gemm_spec import gemm_demands
from runner.planning.library_check import differences
from runner.planning.plan import make_plan, use_to_json
from runner.standin.gpus import Gpu
from tests.unit.small_cache import GEMM, NVCC_TEXT, keys_for, small_library, small_plan

Capture = pytest.CaptureFixture[str]

# Differences between hand-made tables

DENSE = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 1024, 1, 132)
GROUPED = GemmShape(T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 64, 128, 4, 132)
A, B, C = (transpose_fp32(k) for k in (128, 256, 384))
ODD = Kernel("odd", "deep_gemm/a.cuh", "odd_impl", ("1",))
DENSE_WORDS = "gemm_nt_f8f8bf16:4096:1024 on 132 SMs"
A_WORDS, B_WORDS, C_WORDS = (f"transpose_fp32 ({k} scales a row)" for k in (1, 2, 3))
ORIGIN = Origin("sgl-deep-gemm 0.1.4.post1", 1, "h200", 132, "sm_90a", Source.LIBRARY)


def table(*runs: tuple[int, int, tuple[Kernel, ...]], shape: GemmShape = DENSE) -> RecordedTable:
    return RecordedTable(ORIGIN, RULES.recipe, {shape: tuple(Run(*run) for run in runs)})


def compared(ours: RecordedTable, theirs: RecordedTable, last: int = 64) -> list[str]:
    return differences([Demand(DENSE, range(1, last + 1))], ours, theirs)


@pytest.mark.parametrize(
    ("theirs", "lines"),
    [
        ([(1, 16, (A,)), (17, 64, (B,))], []),
        ([(1, 8, (A,)), (9, 16, (A,)), (17, 64, (B,))], []),
        (
            [(1, 15, (A,)), (16, 64, (B,))],
            [
                f"{A_WORDS} is run by M 1..15, not 1..16",
                f"{B_WORDS} is run by M 16..64, not 17..64",
            ],
        ),
        (
            [(1, 64, (A,))],
            [
                f"{A_WORDS} is run by M 1..64, not 1..16",
                f"M 17..64 would run {B_WORDS}, but none does",
            ],
        ),
        (
            [(1, 16, (A,)), (17, 63, (B,)), (64, 64, (B, C))],
            [f"M 64 run {C_WORDS}, which no rule gives"],
        ),
        (
            [(1, 16, (A,)), (17, 64, (ODD,))],
            [
                f"M 17..64 would run {B_WORDS}, but none does",
                f"M 17..64 run odd ({ODD.identity}), which no rule gives",
            ],
        ),
        (
            [(m, m, (A,) if m % 2 else (B,)) for m in range(1, 65)],
            [
                f"{A_WORDS} is run by M 1, 3, 5, ..., not 1..16",
                f"{B_WORDS} is run by M 2, 4, 6, ..., not 17..64",
            ],
        ),
    ],
    ids=["equal", "split run", "other M", "never run", "no rule", "unknown", "many ranges"],
)
def test_differences_name_kernels_whose_m_differ(
    theirs: list[tuple[int, int, tuple[Kernel, ...]]], lines: list[str]
) -> None:
    ours = table((1, 16, (A,)), (17, 64, (B,)))
    assert compared(ours, table(*theirs)) == [f"{DENSE_WORDS}: {line}" for line in lines]


def test_differences_are_listed_per_gemm() -> None:
    demands = [Demand(DENSE, (1,)), Demand(GROUPED, (1, 2))]
    ours = merge_tables(table((1, 1, (A,))), table((1, 2, (A,)), shape=GROUPED))
    theirs = merge_tables(table((1, 1, (B,))), table((1, 1, (A,)), (2, 2, (B,)), shape=GROUPED))
    grouped = "grouped_gemm_nt_f8f8bf16_masked:64:128:4 on 132 SMs"
    assert differences(demands, ours, theirs) == [
        f"{DENSE_WORDS}: M 1 would run {A_WORDS}, but none does",
        f"{DENSE_WORDS}: M 1 run {B_WORDS}, which no rule gives",
        f"{grouped}: {A_WORDS} is run by M 1, not 1..2",
        f"{grouped}: M 2 run {B_WORDS}, which no rule gives",
    ]
    assert differences(demands[:1], ours, ours) == []


def test_gemm_missing_in_a_table_is_an_error() -> None:
    with pytest.raises(
        UserError,
        match=r"^no table of sgl-deep-gemm 0\.1\.4\.post1 on h200 has gemm_nt_f8f8bf16:4096",
    ):
        compared(table((1, 64, (A,))), table((1, 64, (A,)), shape=GROUPED))


def choices() -> st.SearchStrategy[list[tuple[Kernel, ...]]]:
    """The kernels run by each of twelve M."""
    some = st.sets(st.sampled_from([A, B, C])).map(lambda kernels: tuple(sorted(kernels, key=str)))
    return st.lists(some, min_size=12, max_size=12)


@given(choices(), choices())
def test_differences_have_one_line_per_differing_kernel(
    ours: list[tuple[Kernel, ...]], theirs: list[tuple[Kernel, ...]]
) -> None:
    tables = [table(*((m, m, ran) for m, ran in enumerate(each, 1))) for each in (ours, theirs)]
    users = [
        {k: [m for m, ran in enumerate(each) if k in ran] for k in (A, B, C)}
        for each in (ours, theirs)
    ]
    differing = [kernel for kernel in (A, B, C) if users[0][kernel] != users[1][kernel]]
    assert len(compared(tables[0], tables[1], last=12)) == len(differing)
    assert compared(tables[0], tables[0], last=12) == []


# The command


@pytest.fixture
def here(tmp_path: Path, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """A small library and an nvcc of release 13.0 in place of what is installed."""
    library = small_library(tmp_path / "deep_gemm")
    monkeypatch.setattr("runner.target.find_library", lambda wanted: library)
    monkeypatch.setattr("runner.kernels.table_file.BUNDLED_FOLDER", tmp_path / "tables")
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(fake_nvcc))
    return library


def plan(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


SMALL = ["--gemm", GEMM, "--max-m", "64"]


def json_of(capsys: Capture, *arguments: str | Path, err: str = "") -> dict[str, Any]:
    assert plan(*arguments, "--json", "-") == 0
    captured = capsys.readouterr()
    assert captured.err == err
    data: dict[str, Any] = json.loads(captured.out)
    return data


HEAD = [
    "sgl-deep-gemm 0.1.4.post1 (JIT 1), h200 (132 SMs, sm_90a), by our rules",
    "compiler: Cuda compilation tools, release 13.0, V13.0.88",
]
"""The first lines of the output: library, GPU, source and compiler."""


def test_json_holds_the_plan_and_is_the_only_output(here: Library, capsys: Capture) -> None:
    data = json_of(capsys, *SMALL)
    keys = keys_for(here, here.include_path)
    kernels = data.pop("kernels")
    assert data == {
        "version": 1,
        "library": "sgl-deep-gemm 0.1.4.post1",
        "generation": 1,
        "gpu": "h200",
        "arch": "sm_90a",
        "source": "by our rules",
        "num_sms": [132],
        "signature": "NVCC13.0",
        "flags": keys.flags,
        "extra_signature": "",
        "for": f"{GEMM}: M up to 64, 132 SMs",
        "policy": None,
    }
    assert kernels == [
        {
            "name": item.kernel.name,
            "cache_key": keys.cache_key(item.kernel),
            "config": config_of(item.kernel),
            "m_ranges": [list(pair) for pair in item.m_ranges],
            "uses": [use_to_json(use) for use in item.uses],
        }
        for item in small_plan().kernels
    ]
    assert [item["m_ranges"] for item in kernels] == [[[1, 64]], [[1, 16]], [[17, 32]], [[33, 64]]]
    assert kernels[1]["uses"] == [
        {
            "type": "gemm_nt_f8f8bf16",
            "n": 4096,
            "k": 1024,
            "num_groups": 1,
            "num_sms": 132,
            "m_step": 1,
            "m_ranges": [[1, 16]],
            "stages": [0],
        }
    ]


def test_json_file_is_written_and_table_printed(
    here: Library, tmp_path: Path, capsys: Capture
) -> None:
    data = json_of(capsys, *SMALL)
    assert plan(*SMALL, "--json", tmp_path / "plan.json") == 0
    captured = capsys.readouterr()
    assert json.loads((tmp_path / "plan.json").read_text()) == data
    lines = captured.out.splitlines()
    assert lines[:3] == [*HEAD, f"{GEMM}: M up to 64, 132 SMs"]
    assert "4 distinct kernels for 1 GEMM shape" in lines
    assert captured.err == ""


def test_sm_count_given_twice_counts_once(here: Library, capsys: Capture) -> None:
    for what in (SMALL, TINY):
        assert plan(*what, "--num-sms", "132,132") == 0
        twice = capsys.readouterr().out
        assert plan(*what, "--num-sms", "132") == 0
        assert capsys.readouterr().out == twice


def test_json_has_m_step_of_contiguous_gemms(capsys: Capture, here: Library) -> None:
    arguments = ["--gemm", "grouped_gemm_nt_f8f8bf16_contig:1024:4096:4", "--max-m", "300"]
    path = here.include_path / "deep_gemm" / "impls" / "sm90_fp8_gemm_1d2d.cuh"
    assert path.is_file()
    steps = {
        use["m_step"] for item in json_of(capsys, *arguments)["kernels"] for use in item["uses"]
    }
    assert steps == {128}


LACKING = (
    "cache keys are left out: deep_gemm's headers are missing: pip install --no-deps "
    "sgl-deep-gemm\n"
)


def test_plan_without_headers_has_no_keys(
    here: Library, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    whole = json_of(capsys, *SMALL)
    monkeypatch.setattr("runner.target.find_library", lambda wanted: None)
    data = json_of(capsys, *SMALL, err=LACKING)
    assert [item["cache_key"] for item in data["kernels"]] == [None] * 4
    for item in [*data["kernels"], *whole["kernels"]]:
        item["cache_key"] = None
    nulls = {"signature": None, "flags": None}
    assert data == {**whole, **nulls}


def test_plan_without_nvcc_has_no_keys_unless_cuda_version_is_given(
    here: Library, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.target.find_nvcc", lambda environ: None)
    words = (
        "there is no nvcc here: give --compiler-text FILE, with what nvcc --version prints on the "
        "machine that will run"
    )
    data = json_of(capsys, *SMALL, err=f"cache keys are left out: {words}\n")
    assert [item["cache_key"] for item in data["kernels"]] == [None] * 4
    assert json_of(capsys, *SMALL, "--cuda-version", "13.0")["signature"] == "NVCC13.0"
    for options, words in (([], "not known"), (["--cuda-version", "13.1"], "NVCC13.1")):
        assert plan(*SMALL, *options) == 0
        assert capsys.readouterr().out.splitlines()[:2] == [HEAD[0], f"compiler: {words}"]


@pytest.mark.parametrize(
    ("arguments", "include", "signature"),
    [
        (["--target-root", "/opt/deep_gemm"], "/opt/deep_gemm/include", "NVCC13.0"),
        (["--cuda-version", "12.9"], None, "NVCC12.9"),
        (["--target-root", "/a", "--cuda-version", "13.1"], "/a/include", "NVCC13.1"),
    ],
)
def test_target_options_change_the_keys(
    arguments: list[str], include: str | None, signature: str, here: Library, capsys: Capture
) -> None:
    ours, theirs = json_of(capsys, *SMALL), json_of(capsys, *SMALL, *arguments)
    path = here.include_path if include is None else Path(include)
    keys = keys_for(here, path, signature)
    found = [item["cache_key"] for item in theirs["kernels"]]
    assert found == [keys.cache_key(item.kernel) for item in small_plan().kernels]
    assert not set(found) & {item["cache_key"] for item in ours["kernels"]}
    assert (theirs["signature"], theirs["flags"]) == (signature, keys.flags)
    assert f"-I{path}" in theirs["flags"].split(" ")


def test_compiler_text_option_changes_the_signature(
    here: Library, tmp_path: Path, capsys: Capture
) -> None:
    text = tmp_path / "nvcc.txt"
    text.write_text(NVCC_TEXT.replace("release 13.0", "release 13.1"))
    assert json_of(capsys, *SMALL, "--compiler-text", text)["signature"] == "NVCC13.1"
    assert plan(*SMALL, "--compiler-text", text) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        HEAD[0],
        "compiler: Built on Wed_Aug_20_01:58:59_PM_PDT_2025; Cuda compilation tools, release 13.1, "
        "V13.0.88",
    ]


@pytest.mark.parametrize(
    ("options", "gpu", "num_sms"),
    [
        (["--gpu", "h20"], "h20", [78]),
        (["--gpu", "H20", "--num-sms", "60,40"], "h20", [40, 60]),
        (["--hardware", "h200"], "h200", [132]),
        (["--num-sms", "112"], "h200", [112]),
    ],
)
def test_sm_count_comes_from_gpu_or_num_sms_option(
    options: list[str], gpu: str, num_sms: list[int], here: Library, capsys: Capture
) -> None:
    data = json_of(capsys, *SMALL, *options)
    assert (data["gpu"], data["num_sms"]) == (gpu, num_sms)
    assert {use["num_sms"] for item in data["kernels"] for use in item["uses"]} == set(num_sms)


TINY = ["--layers", "3", "--pp", "1", "--tp", "2", "--max-tokens", "256"]


def test_policy_option_lists_uncovered_gemms(here: Library, capsys: Capture) -> None:
    assert plan(*TINY, "--policy", "full") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = [line.rstrip() for line in captured.out.splitlines()]
    assert lines[:3] == [
        *HEAD,
        "dsv4, 3 layers: pp 1 x tp 2, forwards of up to 256 tokens, 132 SMs",
    ]
    at = lines.index("")
    assert lines[at + 1 : at + 3] == [
        "full: compiles 59 of 71 planned kernels until the first request is answered, and 62 that "
        "nothing",
        "needs",
    ]
    assert [line.split() for line in lines[at + 3 :]] == [
        ["uncovered", "GEMM", "num_sms", "M", "that", "would", "stall"],
        ["paged_mqa_logits_metadata:1:1", "132", "33..256"],
        ["fp8_einsum_bhr_hdr_bhd:1024:4096:4", "132", "17..256"],
    ]


def test_stream_option_lists_stalling_forwards(here: Library, capsys: Capture) -> None:
    """New kernels are needed from M 17 and 33 by the einsum, from 33 by the metadata."""
    assert plan(*TINY, "--policy", "full", "--stream", "20,40,20") == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("", lines.index("") + 1)
    assert [line.split() for line in lines[at + 1 :]] == [
        ["forward", "that", "stalls", "node", "kernels", "it", "compiles"],
        ["EXTEND", "20", "0", "1", "sm90_fp8_gemm_1d2d"],
        ["EXTEND", "40", "0", "1", "sm90_fp8_gemm_1d2d,", "1", "sm90_paged_mqa_logits_metadata"],
    ]


def test_json_lists_stalls_of_the_stream(
    here: Library, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.target.find_library", lambda wanted: None)
    arguments = [*TINY, "--policy", "full", "--stream", "20,40"]
    stalls = json_of(capsys, *arguments, err=LACKING)["policy"]["stalls"]
    assert [(at, name, node) for at, name, node, _ in stalls] == [
        (0, "EXTEND 20", 0),
        (2, "EXTEND 40", 0),
        (2, "EXTEND 40", 0),
    ]


@pytest.mark.parametrize("policy", ["planned", "prebuilt"])
def test_policy_that_covers_everything_says_so(policy: str, here: Library, capsys: Capture) -> None:
    assert plan(*TINY, "--policy", policy) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{policy}: compiles 71 of 71 planned kernels until the first request is answered",
        "covered: no planned token count compiles anything afterwards",
    ]


def test_json_describes_coverage_of_the_policy(
    here: Library, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.target.find_library", lambda wanted: None)
    data = json_of(capsys, *TINY, "--policy", "full", err=LACKING)
    told = data["policy"]
    # The first request has one token, so it compiles all kernels needed for one token.
    assert (told["name"], told["missing"], told["superfluous"]) == ("full", 12, 62)
    assert told["compiled"] == len(data["kernels"]) - 12 + 62 == 121
    assert [(use["type"], use["m_ranges"]) for use in told["uncovered"]] == [
        ("paged_mqa_logits_metadata", [[33, 256]]),
        ("fp8_einsum_bhr_hdr_bhd", [[17, 256]]),
    ]


# Invalid input


def refuses(capsys: Capture, line: str, *arguments: str | Path) -> None:
    assert plan(*arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {line}\n")


KNOWN = ", ".join(kind.name.lower() for kind in T)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--gemm", "gemm:1:1"],
            f"--gemm 'gemm:1:1': type 'gemm' is not known: use one of {KNOWN}",
        ),
        ([*SMALL, "--policy", "full"], "--policy needs a model: a single GEMM has no warm-up"),
        (
            [*SMALL, "--policy", "some"],
            "Invalid value for '--policy': 'some' is not one of 'none', 'full', 'fast', "
            "'pp-parallel', 'pp-parallel+full', 'pp-parallel+fast', 'relax', 'planned', "
            "'prebuilt'.",
        ),
        (
            [*SMALL, "--stream", "4"],
            "--stream describes the run of a warm-up: give --policy with it",
        ),
        (
            [*SMALL, "--nodes", "2"],
            "--nodes describes the run of a warm-up: give --policy with it",
        ),
        (
            [*SMALL, "--walk-memory", "2"],
            "--walk-memory describes the run of a warm-up: give --policy with it",
        ),
        (
            [*TINY, "--policy", "full", "--cuda-graphs", "0"],
            "Invalid value for '--cuda-graphs': '0' must be whole numbers from 1 on, such as "
            "1,128,1024",
        ),
        (
            [*TINY, "--policy", "full", "--stream", "4,0"],
            "Invalid value for '--stream': '4,0' must be whole numbers from 1 on, such as "
            "1,128,1024",
        ),
        (
            [*TINY, "--policy", "full", "--walk-max-m", "0"],
            "Invalid value for '--walk-max-m': 0 is not in the range x>=1.",
        ),
        (
            [*SMALL, "--gpu", "a100"],
            "GPU 'a100' is not known: use one of h100, h200, h20, b200, gb200, b300, gb300, "
            "rtx-pro-6000",
        ),
        (
            [*SMALL, "--num-sms", "0"],
            "Invalid value for '--num-sms': '0' must be whole numbers from 1 on, such as "
            "1,128,1024",
        ),
        (
            [*SMALL, "--num-sms", "132,0"],
            "Invalid value for '--num-sms': '132,0' must be whole numbers from 1 on, such as "
            "1,128,1024",
        ),
        (
            [*SMALL, "--json", "/no/plan.json"],
            "cannot write /no/plan.json: its folder does not exist",
        ),
        (
            [*TINY, "--max-m", "5"],
            "--max-m goes with --gemm only: a deployment's limit is --max-tokens",
        ),
        (["--gemm", GEMM, "--max-m", "0"], "--max-m 0 must lie in 1..1048576"),
        (
            ["--gemm", GEMM, "--num-sms", "x"],
            "Invalid value for '--num-sms': 'x' must be whole numbers from 1 on, such as "
            "1,128,1024",
        ),
    ],
)
def test_invalid_input_is_a_one_line_error(
    arguments: list[str], line: str, here: Library, capsys: Capture
) -> None:
    refuses(capsys, line, *arguments)


@pytest.fixture
def library_answers(monkeypatch: pytest.MonkeyPatch) -> list[RecordedTable]:
    """A list of tables that a fake library returns, one per question."""
    answers: list[RecordedTable] = []

    class Answering:
        def __init__(self, library: Library, gpu: Gpu, *rest: object) -> None:
            assert (library.title, gpu.name) == ("sgl-deep-gemm 0.1.4.post1", "h200")

        def table(self, demands: Callable[[], Iterable[Demand]]) -> RecordedTable:
            assert [demand.shape for demand in demands()] == [DENSE]
            return answers.pop()

    monkeypatch.setattr("runner.kernels.library.LibrarySource", Answering)
    return answers


def recorded(change: Callable[[int], int] = int) -> RecordedTable:
    """A library's answer with our rules' kernels; each M runs the kernels of ``change(M)``."""
    return table(*((m, m, kernels_of(DENSE.call(change(m)))) for m in range(1, 65)))


def test_check_reports_no_difference(
    here: Library, library_answers: list[RecordedTable], capsys: Capture
) -> None:
    library_answers.append(recorded())
    assert plan(*SMALL, "--check") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "sgl-deep-gemm 0.1.4.post1 (JIT 1), h200 (132 SMs, sm_90a), asked on a stand-in GPU",
        f"{GEMM}: M up to 64, 132 SMs",
        "no difference: 4 kernels in 64 calls, and each M runs the same kernel in our rules and in "
        "the library",
    ]
    assert captured.err == ""


def test_check_refuses_library_without_rules(
    here: Library, library_answers: list[RecordedTable], capsys: Capture
) -> None:
    known = recorded()
    library_answers.append(replace(known, origin=replace(known.origin, library="vllm 0.33.0")))
    assert plan(*SMALL, "--check") == 2
    assert (
        "--check needs sgl-deep-gemm 0.1.4.post1 on sm_90a, but this is vllm 0.33.0 on sm_90a: "
        "there are no rules for it"
    ) in capsys.readouterr().err


def test_check_reports_each_difference(
    here: Library, library_answers: list[RecordedTable], capsys: Capture
) -> None:
    """The library switches to the next tile one row earlier than our rules."""
    library_answers.append(recorded(lambda m: 17 if m == 16 else m))
    assert plan(*SMALL, "--check") == 1
    captured = capsys.readouterr()
    words = [f"sm90_fp8_gemm_1d2d (tile {m}x32x128, 16 stages, 132 SMs)" for m in (16, 32)]
    assert captured.out.splitlines() == [
        f"{DENSE_WORDS}: {words[0]} is run by M 1..15, not 1..16",
        f"{DENSE_WORDS}: {words[1]} is run by M 16..32, not 17..32",
    ]
    assert captured.err == "error: 2 differences between our rules and the library\n"


def test_check_requires_an_installed_library(
    here: Library, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.target.find_library", lambda wanted: None)
    line = (
        "only the library itself knows its kernels for h200 (sm_90a), and none is installed here: "
        "pip install 'deepgemm-coldstart[library]', or give one with --library (our rules cover "
        "sgl-deep-gemm 0.1.4.post1 on Hopper GPUs only)"
    )
    refuses(capsys, line, *SMALL, "--check")


@pytest.mark.parametrize("json_path", [None, "-", "x.json"])
@pytest.mark.parametrize("headers", [True, False])
@pytest.mark.parametrize(
    ("option", "line"),
    [
        (["--cuda-version", "13"], "--cuda-version '13' must be X.Y, such as 13.0"),
        (["--cuda-version", "12.8"], "--cuda-version 12.8 is too old: 12.9 or newer is needed"),
        (
            ["--target-root", "dg"],
            "--target-root dg must be an absolute path: it is part of the key",
        ),
    ],
    ids=["not a release", "old release", "relative path"],
)
def test_invalid_target_is_refused_before_anything_is_printed(
    option: list[str],
    line: str,
    headers: bool,
    json_path: str | None,
    here: Library,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    if not headers:
        monkeypatch.setattr("runner.target.find_library", lambda wanted: None)
    refuses(capsys, line, *SMALL, *option, *(["--json", json_path] if json_path else []))
    assert not (tmp_path / "x.json").exists()


def test_invalid_gemm_gives_no_traceback_from_the_command() -> None:
    code = "from runner.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "--gemm", "gemm_nt_f8f8bf16:4096"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --gemm 'gemm_nt_f8f8bf16:4096' must be TYPE:N:K or TYPE:N:K:GROUPS with whole "
        "numbers\n"
    )


def test_plan_of_several_gemms_and_sm_counts_equals_make_plan(
    here: Library, capsys: Capture
) -> None:
    """A GEMM that is given twice is planned once."""
    specs = [GEMM, "fp8_mqa_logits:64:128", GEMM]
    options = [word for spec in specs for word in ("--gemm", spec)]
    path = here.include_path / "deep_gemm" / "impls" / "sm90_fp8_mqa_logits.cuh"
    path.write_text("int a;\n")
    data = json_of(capsys, *options, "--max-m", "64", "--num-sms", "132,112")
    demands = [
        demand
        for spec in specs[:2]
        for num_sms in (132, 112)
        for demand in gemm_demands(spec, max_m=64, num_sms=num_sms)
    ]
    assert data["num_sms"] == [112, 132]
    assert [(item["name"], item["config"]) for item in data["kernels"]] == [
        (item.kernel.name, config_of(item.kernel)) for item in make_plan(demands, RULES).kernels
    ]
