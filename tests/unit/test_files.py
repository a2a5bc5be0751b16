"""Writing JSON files."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path

import pytest

from runner.errors import UserError
from runner.files import write_json


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
