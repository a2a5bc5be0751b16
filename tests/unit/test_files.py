"""Writing files, and what is there before."""

from __future__ import annotations

import json
import os
import resource
import threading
from math import inf, nan
from pathlib import Path

import pytest

from runner.errors import UserError
from runner.files import replacing, write_json, write_text


@pytest.mark.parametrize("number", [nan, inf, -inf])
def test_non_finite_numbers_are_not_written(number: float, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=f"^cannot write {path}: ") as caught:
        write_json(path, {"seconds": [1.5, number]})
    assert "\n" not in str(caught.value) and not path.exists()


def test_json_is_written_on_one_line_unless_indented(tmp_path: Path) -> None:
    data = {"a": [1, None], "b": "x"}
    write_json(tmp_path / "short.json", data)
    write_json(tmp_path / "long.json", data, indent=1)
    assert (tmp_path / "short.json").read_text() == '{"a":[1,null],"b":"x"}\n'
    assert json.loads((tmp_path / "long.json").read_text()) == data


def test_writing_json_to_a_directory_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}: Is a directory"):
        write_json(tmp_path, {})


def test_existing_file_stays_whole_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=f"^cannot write {path}: File too large"):
            write_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.touch(0o640)
    write_text(path, "new")
    assert (path.stat().st_mode & 0o777, path.read_text()) == (0o640, "new\n")


@pytest.mark.parametrize("old", ["old", None])
def test_file_that_a_symlink_points_to_is_written(tmp_path: Path, old: str | None) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "x.json", tmp_path / "link"
    if old is not None:
        target.write_text(old)
    link.symlink_to(Path("folder") / "x.json")
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"


def test_pipe_is_written_and_stays(tmp_path: Path) -> None:
    path, read = tmp_path / "pipe", list[str]()
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()), daemon=True)
    reader.start()
    with replacing(path) as opened:
        assert opened == path
        opened.write_text("new")
    reader.join(20)
    assert path.is_fifo() and read == ["new"]
