"""Writing results where the user asked for them."""

from __future__ import annotations

from pathlib import Path

from runner.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write ``text`` and a newline to ``path``; ``-`` is standard output.

    Raises:
        UserError: the file cannot be written.
    """
    if str(path) == "-":
        print(text)
        return
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
