"""``runner plan``: our rules against the library's answers, its JSON, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cli import main
from runner.gemm_spec import gemm_demands
from runner.jit.check import FirstM, differences, planned_first_m
from runner.jit.describe import config_of
from runner.jit.kernel_type import DeepGemmKernelType as T
from runner.jit.kernels import kernels_of
from runner.jit.keys import CacheKeys
from runner.jit.library import Library
from runner.jit.plan import Demand, GemmShape, make_plan
from runner.jit.plan_json import use_to_json
from tests.unit.small_cache import GEMM, keys_for, small_library, small_plan

Capture = pytest.CaptureFixture[str]

# The differences, on values made by hand

DENSE = GemmShape(T.GEMM_NT_F8F8BF16, 4096, 1024, 1, 132)
GROUPED = GemmShape(T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 64, 128, 4, 132)
MORE_GROUPS = GemmShape(T.GROUPED_GEMM_NT_F8F8BF16_MASKED, 64, 128, 8, 132)
DENSE_WORDS = "gemm_nt_f8f8bf16:4096:1024 on 132 SMs"
GROUPED_WORDS = "grouped_gemm_nt_f8f8bf16_masked:64:128 on 132 SMs"


@pytest.mark.parametrize(
    ("planned", "asked", "lines"),
    [
        ({}, {}, []),
        ({(DENSE, "a"): 1, (DENSE, "b"): 17}, {(DENSE, "b"): 17, (DENSE, "a"): 1}, []),
        ({(DENSE, "a"): 3}, {}, [f"{DENSE_WORDS}: a is planned from M 3, never asked for"]),
        ({}, {(DENSE, "a"): 3}, [f"{DENSE_WORDS}: a is asked for at M 3, not planned"]),
        (
            {(DENSE, "a"): 3},
            {(DENSE, "a"): 4},
            [f"{DENSE_WORDS}: a is planned from M 3, asked for at 4"],
        ),
        (
            {(DENSE, "a"): 1},
            {(DENSE, "b"): 1},
            [
                f"{DENSE_WORDS}: a is planned from M 1, never asked for",
                f"{DENSE_WORDS}: b is asked for at M 1, not planned",
            ],
        ),
        (
            {(DENSE, "a"): 1},
            {(GROUPED, "a"): 1},
            [
                f"{DENSE_WORDS}: a is planned from M 1, never asked for",
                f"{GROUPED_WORDS}: a is asked for at M 1, not planned",
            ],
        ),
    ],
    ids=["nothing", "equal", "never asked", "not planned", "other M", "other key", "other GEMM"],
)
def test_differences(planned: FirstM, asked: FirstM, lines: list[str]) -> None:
    assert differences(planned, asked) == lines


def test_numbers_of_groups_are_one_family() -> None:
    """A process asks for a kernel once, so which number of groups was first tells nothing."""
    planned = {(GROUPED, "a"): 5, (MORE_GROUPS, "a"): 2, (MORE_GROUPS, "b"): 7}
    assert differences(planned, {(GROUPED, "a"): 2, (GROUPED, "b"): 7}) == []
    assert differences({(GROUPED, "a"): 2, (GROUPED, "b"): 7}, planned) == []
    assert differences(planned, {(GROUPED, "a"): 5, (GROUPED, "b"): 7}) == [
        f"{GROUPED_WORDS}: a is planned from M 2, asked for at 5"
    ]
    assert differences(planned, {(MORE_GROUPS, "a"): 2}) == [
        f"{GROUPED_WORDS}: b is planned from M 7, never asked for"
    ]


@pytest.mark.parametrize("field", ["n", "k", "num_sms", "type"])
def test_all_but_the_groups_tells_gemms_apart(field: str) -> None:
    values = {name: getattr(DENSE, name) for name in ("type", "n", "k", "num_groups", "num_sms")}
    values[field] = T.GEMM_NT_BF16BF16F32 if field == "type" else values[field] + 1
    other = GemmShape(**values)
    assert len(differences({(DENSE, "a"): 1}, {(other, "a"): 1})) == 2


def answers() -> st.SearchStrategy[dict[tuple[GemmShape, str], int]]:
    at = st.tuples(st.sampled_from([DENSE, GROUPED]), st.sampled_from("abc"))
    return st.dictionaries(at, st.integers(1, 5))


@given(answers(), answers())
def test_there_is_one_line_for_each_kernel_that_differs(planned: FirstM, asked: FirstM) -> None:
    differing = [at for at in {*planned, *asked} if planned.get(at) != asked.get(at)]
    assert len(differences(planned, asked)) == len(differing)
    assert differences(planned, planned) == []


@pytest.fixture
def keys(tmp_path: Path) -> CacheKeys:
    return keys_for(small_library(tmp_path / "deep_gemm"))


def test_the_first_m_of_a_plan(keys: CacheKeys) -> None:
    found = planned_first_m(small_plan(), keys)
    kernels = {m: kernels_of(DENSE.call(m)) for m in (1, 17, 33)}
    assert found == {
        (DENSE, keys.cache_key(kernels[1][0])): 1,
        **{(DENSE, keys.cache_key(kernels[m][1])): m for m in kernels},
    }
    assert differences(found, dict(reversed(found.items()))) == []


def test_the_first_m_of_a_gemm_that_is_demanded_twice(keys: CacheKeys) -> None:
    twice = make_plan([Demand(DENSE, range(1, 65)), Demand(DENSE, range(40, 65))])
    assert planned_first_m(twice, keys) == planned_first_m(small_plan(), keys)


# The command


@pytest.fixture
def here(tmp_path: Path, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """A small library and an nvcc of release 13.0 in place of what is installed."""
    library = small_library(tmp_path / "deep_gemm")
    monkeypatch.setattr("runner.cli.deployment.find_library", lambda: library)
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


def test_json_is_the_plan_and_nothing_else(here: Library, capsys: Capture) -> None:
    data = json_of(capsys, *SMALL)
    keys = keys_for(here, here.include_path)
    kernels = data.pop("kernels")
    assert data == {
        "version": 1,
        "library": "sgl-deep-gemm 0.1.4.post1",
        "arch": "sm_90a",
        "num_sms": [132],
        "signature": "NVCC13.0",
        "include_path": str(here.include_path),
        "flags": keys.flags,
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
            "type": "gemm_nt_f8f8bf16", "n": 4096, "k": 1024, "num_groups": 1, "num_sms": 132,
            "m_step": 1, "m_ranges": [[1, 16]], "stages": [0],
        }
    ]  # fmt: skip


def test_json_in_a_file_beside_the_table(here: Library, tmp_path: Path, capsys: Capture) -> None:
    data = json_of(capsys, *SMALL)
    assert plan(*SMALL, "--json", tmp_path / "plan.json") == 0
    captured = capsys.readouterr()
    assert json.loads((tmp_path / "plan.json").read_text()) == data
    lines = captured.out.splitlines()
    assert lines[0] == f"{GEMM}: M up to 64, 132 SMs"
    assert "4 distinct kernels for 1 GEMM shapes" in lines
    assert captured.err == ""


def test_json_of_a_type_whose_rows_come_in_steps(capsys: Capture, here: Library) -> None:
    arguments = ["--gemm", "grouped_gemm_nt_f8f8bf16_contig:1024:4096:4", "--max-m", "300"]
    path = here.include_path / "deep_gemm" / "impls" / "sm90_fp8_gemm_1d2d.cuh"
    assert path.is_file()
    steps = {use["m_step"] for item in json_of(capsys, *arguments)["kernels"]
             for use in item["uses"]}  # fmt: skip
    assert steps == {128}


LACKING = (
    "cache keys are left out: deep_gemm's headers are missing: pip install --no-deps "
    "sgl-deep-gemm==0.1.4.post1\n"
)


def test_without_headers_there_are_no_keys(
    here: Library, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    whole = json_of(capsys, *SMALL)
    monkeypatch.setattr("runner.cli.deployment.find_library", lambda: None)
    data = json_of(capsys, *SMALL, err=LACKING)
    assert [item["cache_key"] for item in data["kernels"]] == [None] * 4
    for item in [*data["kernels"], *whole["kernels"]]:
        item["cache_key"] = None
    nulls = {"signature": None, "include_path": None, "flags": None}
    assert data == {**whole, **nulls}


def test_without_an_nvcc_there_are_no_keys(
    here: Library, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.cli.deployment.find_nvcc", lambda environ: None)
    words = "there is no nvcc here: name the runner's with --cuda-version X.Y"
    data = json_of(capsys, *SMALL, err=f"cache keys are left out: {words}\n")
    assert [item["cache_key"] for item in data["kernels"]] == [None] * 4
    assert json_of(capsys, *SMALL, "--cuda-version", "13.0")["signature"] == "NVCC13.0"


@pytest.mark.parametrize(
    ("arguments", "include", "signature"),
    [
        (["--target-root", "/opt/deep_gemm"], "/opt/deep_gemm/include", "NVCC13.0"),
        (["--cuda-version", "12.9"], None, "NVCC12.9"),
        (["--target-root", "/a", "--cuda-version", "13.1"], "/a/include", "NVCC13.1"),
    ],
)
def test_keys_of_another_machine(
    arguments: list[str], include: str | None, signature: str, here: Library, capsys: Capture
) -> None:
    ours, theirs = json_of(capsys, *SMALL), json_of(capsys, *SMALL, *arguments)
    path = here.include_path if include is None else Path(include)
    keys = keys_for(here, path, signature)
    found = [item["cache_key"] for item in theirs["kernels"]]
    assert found == [keys.cache_key(item.kernel) for item in small_plan().kernels]
    assert not set(found) & {item["cache_key"] for item in ours["kernels"]}
    assert (theirs["signature"], theirs["include_path"]) == (signature, str(path))
    assert theirs["flags"] == keys.flags


TINY = ["--layers", "3", "--pp", "1", "--tp", "2", "--max-tokens", "256"]


def test_a_policy_that_leaves_stalls(here: Library, capsys: Capture) -> None:
    assert plan(*TINY, "--policy", "full") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = [line.rstrip() for line in captured.out.splitlines()]
    assert lines[0] == ("dsv4, 3 layers: pp 1 x tp 2, forwards of up to 256 tokens, 132 SMs")
    at = lines.index("")
    assert lines[at + 1 : at + 3] == [
        "full: compiles 59 of 71 planned kernels until the first request is answered, and 62 that "
        "nothing", "needs",
    ]  # fmt: skip
    assert [line.split() for line in lines[at + 3 :]] == [
        ["uncovered", "GEMM", "num_sms", "M", "that", "would", "stall"],
        ["paged_mqa_logits_metadata:1:1", "132", "33..256"],
        ["fp8_einsum_bhr_hdr_bhd:1024:4096:4", "132", "17..256"],
    ]


def test_what_a_stream_would_compile(here: Library, capsys: Capture) -> None:
    """One token after another class of M: the einsum at 17 and 33, the metadata at 33."""
    assert plan(*TINY, "--policy", "full", "--stream", "20,40,20") == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("", lines.index("") + 1)
    assert [line.split() for line in lines[at + 1 :]] == [
        ["forward", "that", "stalls", "node", "kernels", "it", "compiles"],
        ["EXTEND", "20", "0", "1", "sm90_fp8_gemm_1d2d"],
        ["EXTEND", "40", "0", "1", "sm90_fp8_gemm_1d2d,", "1", "sm90_paged_mqa_logits_metadata"],
    ]


def test_a_streams_stalls_as_json(
    here: Library, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.cli.deployment.find_library", lambda: None)
    arguments = [*TINY, "--policy", "full", "--stream", "20,40"]
    stalls = json_of(capsys, *arguments, err=LACKING)["policy"]["stalls"]
    assert [(at, name, node) for at, name, node, _ in stalls] == [
        (0, "EXTEND 20", 0), (2, "EXTEND 40", 0), (2, "EXTEND 40", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("policy", ["planned", "prebuilt"])
def test_a_policy_that_leaves_none(policy: str, here: Library, capsys: Capture) -> None:
    assert plan(*TINY, "--policy", policy) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{policy}: compiles 71 of 71 planned kernels until the first request is answered",
        "covered: no token count up to the limit compiles anything afterwards",
    ]


def test_a_policy_as_json(here: Library, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("runner.cli.deployment.find_library", lambda: None)
    data = json_of(capsys, *TINY, "--policy", "full", err=LACKING)
    told = data["policy"]
    # The first request, one token, brings the rest of the kernels that one token needs.
    assert (told["name"], told["missing"], told["superfluous"]) == ("full", 12, 62)
    assert told["compiled"] == len(data["kernels"]) - 12 + 62 == 121
    assert [(use["type"], use["m_ranges"]) for use in told["uncovered"]] == [
        ("paged_mqa_logits_metadata", [[33, 256]]), ("fp8_einsum_bhr_hdr_bhd", [[17, 256]]),
    ]  # fmt: skip


# Bad input


def refuses(capsys: Capture, line: str, *arguments: str | Path) -> None:
    assert plan(*arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {line}\n")


KNOWN = ", ".join(kind.name.lower() for kind in T)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gemm", "gemm:1:1"],
         f"--gemm 'gemm:1:1': type 'gemm' is not known: use one of {KNOWN}"),
        ([*SMALL, "--policy", "full"], "--policy needs a model: a single GEMM has no warm-up"),
        ([*SMALL, "--policy", "some"],
         "Invalid value for '--policy': 'some' is not one of 'none', 'full', 'fast', "
         "'pp-parallel', 'pp-parallel+full', 'pp-parallel+fast', 'relax', 'planned', 'prebuilt'."),
        ([*SMALL, "--stream", "4"],
         "--nodes, --stream, --walk-max-m, --walk-memory and --cuda-graphs tell about a warm-up: "
         "give --policy"),
        ([*SMALL, "--nodes", "2"],
         "--nodes, --stream, --walk-max-m, --walk-memory and --cuda-graphs tell about a warm-up: "
         "give --policy"),
        ([*SMALL, "--walk-memory", "2"],
         "--nodes, --stream, --walk-max-m, --walk-memory and --cuda-graphs tell about a warm-up: "
         "give --policy"),
        ([*TINY, "--policy", "full", "--cuda-graphs", "0"],
         "--cuda-graphs 0 must all be at least 1"),
        ([*TINY, "--policy", "full", "--stream", "4,0"], "--stream 4,0 must all be at least 1"),
        ([*TINY, "--policy", "full", "--walk-max-m", "0"],
         "Invalid value for '--walk-max-m': 0 is not in the range x>=1."),
        ([*SMALL, "--source", "guess"],
         "Invalid value for '--source': 'guess' is not one of 'rules', 'library'."),
        ([*SMALL, "--cache-dir", "/"], "--cache-dir / goes with --source library only"),
        ([*SMALL, "--check", "--cache-dir", "/"], "--cache-dir / goes with --source library only"),
        ([*SMALL, "--cache-dir", "/no/cache"],
         "Invalid value for '--cache-dir': Directory '/no/cache' does not exist."),
        ([*SMALL, "--json", "/no/plan.json"],
         "cannot write /no/plan.json: its folder does not exist"),
        ([*SMALL, "--json", "-", "--cuda-version", "13"],
         "--cuda-version '13' must be X.Y, such as 13.0"),
        ([*SMALL, "--json", "-", "--cuda-version", "11.8"],
         "--cuda-version 11.8 is too old: 12.9 or newer is needed"),
        ([*SMALL, "--json", "-", "--target-root", "deep_gemm"],
         "--target-root deep_gemm must be an absolute path: the key holds it"),
        ([*SMALL, "--check", "--jobs", "0"], "--jobs 0 must be at least 1"),
        ([*SMALL, "--source", "library", "--jobs", "-1"], "--jobs -1 must be at least 1"),
        (["--gemm", GEMM, "--max-m", "0"], "--max-m 0 must lie in 1..1048576"),
        (["--gemm", GEMM, "--num-sms", "x"],
         "Invalid value for '--num-sms': 'x' is not a list of integers such as 1,128,1024"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    arguments: list[str], line: str, here: Library, capsys: Capture
) -> None:
    refuses(capsys, line, *arguments)


@pytest.mark.parametrize("option", [["--source", "library"], ["--check"]])
def test_the_library_cannot_be_asked_without_a_gpu(
    option: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("runner.cli.ask_library.find_spec", lambda name: name)
    line = "asking the library needs a Hopper GPU: there is none here"
    refuses(capsys, line, *SMALL, *option, "--json", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("lacking", ["torch", "deep_gemm"])
def test_the_library_cannot_be_asked_without_what_it_needs(
    lacking: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def find(name: str) -> str | None:
        return None if name == lacking else name

    monkeypatch.setattr("runner.cli.ask_library.find_spec", find)
    line = (
        "asking the library needs a Hopper GPU, torch and deep_gemm: pip install "
        "'deepgemm-coldstart[torch,gpu]'"
    )
    refuses(capsys, line, *SMALL, "--source", "library")


@pytest.mark.parametrize("asking", [["--source", "library"], ["--check"]])
@pytest.mark.parametrize(
    "option", [["--policy", "full"], ["--target-root", "/opt/dg"], ["--cuda-version", "13.0"]]
)
def test_the_library_answers_for_itself(
    asking: list[str], option: list[str], here: Library, capsys: Capture
) -> None:
    line = (
        "--policy, --target-root and --cuda-version do not go with --source library or --check: "
        "the library here answers for itself"
    )
    refuses(capsys, line, *TINY, *asking, *option)


@pytest.mark.parametrize("json_path", [None, "-", "x.json"])
@pytest.mark.parametrize("headers", [True, False])
@pytest.mark.parametrize(
    ("option", "line"),
    [
        (["--cuda-version", "13"], "--cuda-version '13' must be X.Y, such as 13.0"),
        (["--cuda-version", "12.8"], "--cuda-version 12.8 is too old: 12.9 or newer is needed"),
        (["--target-root", "dg"], "--target-root dg must be an absolute path: the key holds it"),
    ],
    ids=["no release", "old release", "relative"],
)
def test_a_bad_target_is_refused_before_anything_is_printed(
    option: list[str], line: str, headers: bool, json_path: str | None, here: Library,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:  # fmt: skip
    """With JSON or without, and whether there are headers or not."""
    monkeypatch.chdir(tmp_path)
    if not headers:
        monkeypatch.setattr("runner.cli.deployment.find_library", lambda: None)
    refuses(capsys, line, *SMALL, *option, *(["--json", json_path] if json_path else []))
    assert not (tmp_path / "x.json").exists()


def test_no_traceback_from_the_program_itself() -> None:
    code = "from runner.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "--gemm", "gemm_nt_f8f8bf16:4096"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --gemm 'gemm_nt_f8f8bf16:4096' must be TYPE:N:K or TYPE:N:K:GROUPS with whole "
        "numbers\n"
    )


def test_the_plan_of_the_command_is_the_planners(here: Library, capsys: Capture) -> None:
    """Several GEMMs and numbers of SMs, each once however often it is named."""
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
        (item.kernel.name, config_of(item.kernel)) for item in make_plan(demands).kernels
    ]
