"""Writing results where the user asked for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path, whose file takes the place of ``path`` at the end; gone after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def write_json(path: Path, data: Any, *, indent: int | None = None) -> None:
    """Write plain data as :func:`write_text` does, on one line unless ``indent`` is given.

    Raises:
        UserError: the file cannot be written, or a number is not finite, which JSON has no word
            for.
    """
    separators = (",", ":") if indent is None else None
    try:
        text = json.dumps(data, indent=indent, separators=separators, allow_nan=False)
    except ValueError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    write_text(path, text)
