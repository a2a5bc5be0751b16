"""``runner plan --calls`` and ``runner compile --calls``: the calls of a recording."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.cache.manifest import read_manifest
from runner.cli import main
from runner.files import write_json
from runner.kernels.call_template import CallShape, Template, generalise
from runner.kernels.installed import Library
from runner.kernels.rules import RULES
from runner.kernels.table import RecordedTable, Run, Shape, Source
from runner.recording.recording import CallGroup, Recording, Seen, to_json
from tests.unit.elf import tiny_cubin
from tests.unit.small_cache import small_plan

Capture = pytest.CaptureFixture[str]


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape)}


GEMM, _ = generalise(
    "bf16_gemm_nt", [tensor("bfloat16", *sizes) for sizes in ((7, 64), (256, 64), (7, 256))], {}
)
NEW = Template("new_function", [tensor("bfloat16", 3, 4)], {})
SHAPE, OTHER = CallShape.of(GEMM, 132), CallShape.of(NEW, 132)
FIRST, SECOND = (item.kernel for item in small_plan().kernels[:2])
TITLE = "2 recorded calls of vllm serve, forwards of up to 64 tokens"
NOTE = "planned for its own sizes only: new_function(bfloat16[3,4]) (not known)\n"


@pytest.fixture
def recording(tmp_path: Path, here: Library) -> Path:
    """Two calls: one with M 7, and one that is not general."""
    groups = [
        CallGroup(GEMM, None, "", [], phases={"ready": Seen({7: 1})}),
        CallGroup(NEW, None, "not known", [], phases={"load": Seen({0: 1})}),
    ]
    path = tmp_path / "recording.json"
    made = Recording(["vllm", "serve"], gpu="h200", library=str(here.root), groups=groups)
    write_json(path, to_json(made))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A table in place of the library's answers; what was asked for: GPU, whether to ask."""
    found: list[tuple[Any, ...]] = []
    origin = replace(RULES.origin, source=Source.LIBRARY)
    runs: dict[Shape, tuple[Run, ...]] = {
        SHAPE: (Run(1, 16, (FIRST,)), Run(17, 64, (FIRST, SECOND))),
        OTHER: (Run(1, 1, ()),),
    }

    def choose(gpu: Any, library: Any, *_: Any, always_ask: bool, **__: Any) -> RecordedTable:
        found.append((gpu.name, always_ask))
        return RecordedTable(origin, RULES.recipe, runs)

    monkeypatch.setattr("runner.target.choose_source", choose)
    return found


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_plan_has_the_kernels_of_every_recorded_call(
    recording: Path, asked: list[tuple[Any, ...]], capsys: Capture
) -> None:
    assert run("plan", "--calls", recording, "--max-tokens", "64", "--json", "-") == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert captured.err == NOTE
    assert asked == [("h200", True)]
    assert (plan["for"], plan["gpu"], plan["num_sms"]) == (TITLE, RULES.origin.gpu, [132])
    assert [kernel["name"] for kernel in plan["kernels"]] == [FIRST.name, SECOND.name]
    use = {"call": SHAPE.text, "num_sms": 132, "m_step": 1, "stages": [0]}
    assert [kernel["uses"] for kernel in plan["kernels"]] == [
        [{**use, "m_ranges": [[1, 64]]}],
        [{**use, "m_ranges": [[17, 64]]}],
    ]


def test_plan_is_printed_by_function(
    recording: Path, asked: list[tuple[Any, ...]], capsys: Capture
) -> None:
    assert run("plan", "--calls", recording, "--max-tokens", "64") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == TITLE
    assert any("bf16_gemm_nt" in line for line in lines)


def test_gpu_that_is_given_replaces_that_of_the_recording(
    recording: Path, asked: list[tuple[Any, ...]], capsys: Capture
) -> None:
    words = ("plan", "--calls", recording, "--max-tokens", "64", "--json", "-")
    assert run(*words, "--gpu", "h100") == 0
    assert asked == [("h100", True)]


def test_m_that_the_library_was_not_asked_for_is_an_error(
    recording: Path, asked: list[tuple[Any, ...]], capsys: Capture
) -> None:
    assert run("plan", "--calls", recording, "--max-tokens", "65") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has bf16_gemm_nt(bfloat16[M,64], bfloat16[256,64], bfloat16[M,256]) with M 65" in error


def test_compile_builds_the_kernels_of_recorded_calls(
    recording: Path,
    asked: list[tuple[Any, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    (tmp_path / "cubin").write_bytes(tiny_cubin(b"code"))
    nvcc = Path(os.environ["DG_JIT_NVCC_COMPILER"])
    nvcc.write_text(nvcc.read_text().replace('cp "$1"', f'cp "{tmp_path}/cubin"'))
    words = ("compile", "--calls", recording, "--max-tokens", "64", "--plain")
    assert run(*words, "--cache-dir", tmp_path / "dg") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(NOTE)
    lines = captured.out.splitlines()
    assert lines[2:4] == [TITLE, f"2 kernels -> {tmp_path}/dg"]
    assert lines[4].startswith("2 built, 0 already there; ")
    manifest = read_manifest(tmp_path / "dg")
    assert manifest is not None and manifest.plans == [TITLE]
    assert {entry.name: entry.uses[0]["call"] for entry in manifest.entries.values()} == {
        FIRST.name: SHAPE.text,
        SECOND.name: SHAPE.text,
    }


@pytest.mark.parametrize("command", ["plan", "compile"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "dsv3"], "--model does not go with --calls: the calls say what is run"),
        (["--pp", "2"], "--pp does not go with --calls: the calls say what is run"),
        (["--gemm", "gemm_nt_f8f8bf16:4096:1024"], "--calls and --gemm both say what is run"),
        (["--max-m", "64"], "--max-m goes with --gemm only"),
        (["--max-tokens", "0"], "max-tokens 0 must lie in 1..131072"),
        (["--max-tokens", "131073"], "max-tokens 131073 must lie in 1..131072"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_with_calls_are_refused(
    command: str,
    options: list[str],
    words: str,
    recording: Path,
    asked: list[tuple[Any, ...]],
    capsys: Capture,
) -> None:
    assert run(command, "--calls", recording, *options) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {words}")


def test_policy_does_not_go_with_calls(
    recording: Path, asked: list[tuple[Any, ...]], capsys: Capture
) -> None:
    assert run("plan", "--calls", recording, "--max-tokens", "64", "--policy", "fast") == 2
    assert "--policy needs a model" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_file_that_is_no_recording_is_refused(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "recording.json"
    assert run("plan", "--calls", path) == 2
    assert capsys.readouterr().err == f"error: cannot read {path}: No such file or directory\n"
    path.write_text("{}")
    assert run("compile", "--calls", path) == 2
    assert capsys.readouterr().err == (
        f"error: {path} is not a recording of runner record or runner rehearse\n"
    )


def test_library_that_is_not_here_is_named(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "recording.json"
    write_json(path, to_json(Recording(gpu="h200", library="/srv/deep_gemm")))
    assert run("plan", "--calls", path) == 2
    assert capsys.readouterr().err == (
        "error: /srv/deep_gemm, the library of the recording, is not here: give one of the same "
        "version with --library\n"
    )
