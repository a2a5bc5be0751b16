"""Exit codes and error lines of commands."""

from __future__ import annotations

import contextlib
import warnings

import click
import pytest

from runner.cli import cli
from runner.errors import UserError, WorkFailedError, run_guarded


def ending_with(error: BaseException | None) -> click.Command:
    @click.command()
    def command() -> None:
        warnings.warn("mind this", stacklevel=1)
        if error is not None:
            raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UserError("no such model"), 2, "error: no such model\n"),
        (click.UsageError("no such option"), 2, "error: no such option\n"),
        (WorkFailedError("47 kernels are missing"), 1, "error: 47 kernels are missing\n"),
        (WorkFailedError("ended by SIGTERM", 143), 143, "error: ended by SIGTERM\n"),
        (click.Abort(), 130, "error: interrupted\n"),
    ],
)
def test_error_and_warning_are_one_line_each_with_exit_code(
    error: BaseException | None, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_guarded(ending_with(error), [], program="runner") == code
    assert capsys.readouterr().err == "warning: mind this\n" + line


@pytest.mark.parametrize("words", [[], ["cache"]])
def test_group_without_a_command_prints_only_its_help(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_guarded(cli, [*words, "--help"], program="runner") == 0
    usage = capsys.readouterr().out
    code = run_guarded(cli, words, program="runner")
    captured = capsys.readouterr()
    assert code in (0, 2)  # Older versions of click do not count it as an error.
    assert (captured.out + captured.err).strip() == usage.strip()


@pytest.mark.parametrize("error", [None, UserError("bad"), ValueError("a bug")])
def test_run_guarded_restores_warning_handler(error: Exception | None) -> None:
    before = warnings.showwarning
    with contextlib.suppress(ValueError):
        run_guarded(ending_with(error), [], program="runner")
    assert warnings.showwarning is before
