"""Output shown in the docs is output that the commands give: each golden block, word for word."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from runner.cli import cli
from runner.cli.guard import run_guarded
from runner.jit.compiler import NvccCompiler

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "docs" / "measurements"
ONE_NODE = ["--nodes", "1", "--link", "gloo", "--ranks-per-gpu", "2"]
SERIAL_PARALLEL = ["--warmup", "none", "--warmup", "pp-parallel"]
FOUR_NODES = ["--layers", "4", "--pp", "4", "--tp", "1", "--batch-sizes", "1", "--link", "gloo"]
PLANS = {
    "plan": ["plan"],
    "plan-gemm": ["plan", "--gemm", "gemm_nt_f8f8bf16:4096:1024"],
    "plan-fast": ["plan", "--policy", "fast"],
}
SWEEPS = {"sweep": ["sweep", "--pp", "1,4", "--nodes", "1,4", "--cores", "4,64"]}
TRANSCRIPT = re.compile(r"<!-- transcript -->\n```\n(.*?)\n```", re.DOTALL)
MEASURED_NUMBER = re.compile(r"\d+\.\d (s|CPU-seconds|MB)\b|\d+ KB|[0-9a-f]{32}")
BLOCK = re.compile(r"<!-- golden: (\S+) -->\n```\n(.*?)\n```", re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """(document, command's name, text) of every golden block."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for name, text in BLOCK.findall(path.read_text()):
            found.append((path.name, name, text))
    return found


def output_of(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command behind a golden block prints, without trailing blanks."""
    if name.startswith("sim"):
        arguments = ["sim"]
    elif name in SWEEPS:
        arguments = SWEEPS[name]
    elif name == "published":
        arguments = ["published"]
    elif name.startswith("plan"):
        arguments = PLANS[name]
    elif name == "compare-four-planned":
        predicted = folder / "predicted.json"
        four_cores = [*FOUR_NODES, "--cores", "4", "--warmup", "planned"]
        made = ["sim", *four_cores, "--timeline", str(predicted)]
        assert run_guarded(cli, made, program="runner") == 0
        capsys.readouterr()
        arguments = ["compare", str(predicted), str(MEASURED / "h200_dsv4_l4_pp4_vn4_planned.json")]
    elif name.startswith("compare-four"):
        predicted = folder / "predicted.json"
        made = ["sim", *FOUR_NODES, *SERIAL_PARALLEL, "--timeline", str(predicted)]
        assert run_guarded(cli, made, program="runner") == 0
        capsys.readouterr()
        arguments = ["compare", str(predicted), str(MEASURED / "h200_dsv4_l4_pp4_vn4.json")]
    else:
        policy = name.removeprefix("compare-").replace("parallel", "pp-parallel")
        predicted = folder / "predicted.json"
        made = ["sim", *ONE_NODE, "--warmup", policy, "--timeline", str(predicted)]
        assert run_guarded(cli, made, program="runner") == 0
        capsys.readouterr()
        arguments = ["compare", str(predicted), str(MEASURED / f"h200_dsv4_pp4tp2_{policy}.json")]
    assert run_guarded(cli, arguments, program="runner") == 0
    return "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(("document", "name", "text"), blocks(), ids=lambda text: text[:20])
def test_golden_output(
    document: str, name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in output_of(name, tmp_path, capsys)


def test_there_are_golden_blocks_in_readme_and_docs() -> None:
    assert {(document, name) for document, name, _ in blocks()} == {
        ("README.md", "sim"),
        ("planning.md", "plan"),
        ("planning.md", "plan-gemm"),
        ("planning.md", "plan-fast"),
        ("sweeping.md", "sweep"),
        ("published.md", "published"),
        ("predictions.md", "sim-full"),
        ("predictions.md", "compare-none"),
        ("predictions.md", "compare-parallel"),
        ("predictions.md", "compare-planned"),
        ("predictions.md", "compare-prebuilt"),
        ("predictions.md", "compare-four-planned"),
        ("predictions.md", "compare-four-none"),
        ("predictions.md", "compare-four-parallel"),
    }


def transcripts() -> list[tuple[str, str]]:
    """(document, text) of every transcript: commands after ``$``, each with what it printed."""
    return [
        (path.name, text)
        for path in sorted((ROOT / "docs").rglob("*.md"))
        for text in TRANSCRIPT.findall(path.read_text())
    ]


def masked(text: str) -> str:
    """Without what a machine decides: seconds, sizes and keys."""
    lines = (line.rstrip() for line in MEASURED_NUMBER.sub("N", text).splitlines())
    return "\n".join(line for line in lines if line)


@pytest.mark.nvcc
@pytest.mark.parametrize(("document", "text"), transcripts(), ids=lambda text: text[:20])
def test_transcripts(
    document: str, text: str, tmp_path: Path, nvcc_compiler: NvccCompiler,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for step in text.removeprefix("$ ").split("\n$ "):
        command, _, shown = step.partition("\n")
        program, *arguments = shlex.split(command)
        assert program == "runner"
        assert run_guarded(cli, arguments, program="runner") == 0
        assert masked(capsys.readouterr().out) == masked(shown), command


def test_there_is_a_transcript() -> None:
    assert [document for document, _ in transcripts()] == ["deploying.md"]


def test_links_between_documents_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
