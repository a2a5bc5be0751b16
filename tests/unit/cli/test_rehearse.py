"""``runner rehearse`` refuses what it cannot rehearse; whole servers need more than CI has."""

from __future__ import annotations

import pytest

from runner.cli import cli
from runner.errors import run_guarded

Capture = pytest.CaptureFixture[str]
SERVE = ("vllm", "serve", "folder")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--", "true"), "true is no server that can be rehearsed: give one of SGLang, vLLM"),
        (("--fix", "--", *SERVE), "--fix builds a cache: say where with --cache-dir DIR"),
        (("--devices", "17", "--", *SERVE), "--devices 17 must lie in 1..16"),
        (("--", *SERVE), "cannot run vllm: no such program"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(
    words: tuple[str, ...], line: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert run_guarded(cli, ["rehearse", "--gpu", "b200", *words], program="runner") == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_prompt_lengths_have_a_default(capsys: Capture) -> None:
    assert run_guarded(cli, ["rehearse", "--help"], program="runner") == 0
    assert "[default: 1,300,4000]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("text", ["0", "1,x", ""])
def test_prompt_lengths_are_whole_numbers(text: str, capsys: Capture) -> None:
    words = ["rehearse", "--gpu", "b200", "--request-tokens", text, "--", *SERVE]
    assert run_guarded(cli, words, program="runner") == 2
    assert "must be whole numbers from 1 on" in capsys.readouterr().err
