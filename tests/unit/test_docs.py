"""The docs show real command output: golden blocks, transcripts, links and API examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from runner.build.compiler import NvccCompiler
from runner.cli import cli
from runner.errors import run_guarded
from tests.golden import BLOCK, COMMANDS, DOCUMENTS, ROOT, SCRIPTS, TRANSCRIPT, run, tidy

MEASURED_NUMBER = re.compile(r"\d+\.\d (s|CPU-seconds|MB)\b|\d+ KiB|[0-9a-f]{32}")


def blocks() -> list[tuple[str, str, str]]:
    """(document, command's name, text) of every golden block."""
    found = []
    for path in DOCUMENTS:
        for name, text in BLOCK.findall(path.read_text()):
            found.append((path.name, name, text))
    return found


@pytest.mark.parametrize(("document", "name", "text"), blocks(), ids=lambda text: text[:20])
def test_golden_block_is_output_of_its_command(
    document: str,
    name: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name in SCRIPTS:
        shown = run([SCRIPTS[name]])
    else:
        monkeypatch.chdir(ROOT)
        assert run_guarded(cli, COMMANDS[name].split(), program="runner") == 0
        shown = capsys.readouterr().out
    assert text.strip("\n") and text.strip("\n") in tidy(shown)


def test_golden_blocks_and_golden_commands_correspond() -> None:
    assert {name for _, name, _ in blocks()} == {*COMMANDS, *SCRIPTS}


def transcripts() -> list[tuple[str, str]]:
    """(document, text) of every transcript: commands after ``$``, each with its output."""
    return [
        (path.name, text) for path in DOCUMENTS for text in TRANSCRIPT.findall(path.read_text())
    ]


def masked(text: str) -> str:
    """The text without figures that depend on the machine: seconds, sizes and keys."""
    lines = (line.rstrip() for line in tidy(MEASURED_NUMBER.sub("N", text)).splitlines())
    return "\n".join(line for line in lines if line)


@pytest.mark.nvcc
@pytest.mark.parametrize(("document", "text"), transcripts(), ids=lambda text: text[:20])
def test_transcript_commands_print_the_shown_output(
    document: str,
    text: str,
    tmp_path: Path,
    nvcc_compiler: NvccCompiler,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in text.removeprefix("$ ").split("\n$ "):
        command, _, shown = step.partition("\n")
        program, *arguments = shlex.split(command)
        assert program == "runner"
        assert run_guarded(cli, arguments, program="runner") == 0
        assert masked(capsys.readouterr().out) == masked(shown), command


def test_only_deploying_md_has_a_transcript() -> None:
    assert [document for document, _ in transcripts()] == ["deploying.md"]


def test_links_between_documents_have_existing_targets() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


_RUN_EXAMPLES = """
import doctest, sys
sys.modules["torch"] = sys.modules["numpy"] = None  # Importing them fails.
sys.exit(doctest.testfile(sys.argv[1], module_relative=False).failed > 0)
"""


@pytest.mark.nvcc
def test_api_examples_run_without_torch_and_numpy(
    nvcc_compiler: NvccCompiler, tmp_path: Path
) -> None:
    """They need only the base install; compiling also needs nvcc and the library's headers."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN_EXAMPLES, ROOT / "docs/api.md"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


ROOMS = ("runner", "sim", "launch")
IMPORT = re.compile(r"^\s*(?:from|import) ((?:runner|sim|launch)\.[\w.]+)", re.MULTILINE)


def test_rooms_of_the_map_import_only_from_rooms_below() -> None:
    map_text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`(?:runner|sim|launch)/.*?`) \|", map_text, re.MULTILINE)
    floors = {
        room.rstrip("/"): floor
        for floor, row in enumerate(rows)
        for room in re.findall(r"`([^`]+)`", row)
    }

    def floor_of(path: Path) -> int | None:
        return next((floors[str(p)] for p in (path, *path.parents) if str(p) in floors), None)

    upward = []
    for file in (path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for module in IMPORT.findall((ROOT / file).read_text()):
            path = Path(module.replace(".", "/"))
            above = floor_of(path.with_suffix(".py") if not (ROOT / path).is_dir() else path)
            own = floor_of(file)
            if own is not None and above is not None and above < own:
                upward.append(f"{file} imports {module}")
    assert not upward
