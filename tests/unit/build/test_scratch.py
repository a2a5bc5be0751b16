"""Scratch folders: each goes in the end, abandoned ones too."""

import fcntl
import tempfile
from pathlib import Path
from typing import IO

import pytest

from runner.build.scratch import scratch_folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's temporary directory of our own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_scratch_folder_is_empty_and_goes(temporary: Path) -> None:
    with scratch_folder() as folder:
        assert folder.name == "work" and list(folder.iterdir()) == []
        assert folder.parent.parent == temporary.resolve()
        assert folder.parent.name.startswith("deepgemm-build-")
        (folder / "kernel.cu").write_text("")
    assert list(temporary.iterdir()) == []


def test_only_abandoned_scratch_goes_with_the_next_build(temporary: Path) -> None:
    abandoned, starting, other = (
        temporary / name for name in ("deepgemm-build-old", "deepgemm-build-new", "else")
    )
    for folder in (abandoned, starting, other):
        (folder / "work").mkdir(parents=True)
    for folder in (abandoned, other):
        (folder / ".lock").touch()
    with scratch_folder() as held:
        assert not abandoned.exists()
        (held / "kernel.cu").touch()
        with scratch_folder() as second:
            assert second != held
            assert (held / "kernel.cu").exists()
    assert sorted(temporary.iterdir()) == [starting, other]


def test_scratch_of_two_builds_that_begin_at_once(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, began = fcntl.flock, []

    def flock(file: IO[str], operation: int) -> None:
        if not began:
            began.append(True)
            with scratch_folder():
                pass
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with scratch_folder() as folder:
        assert folder.is_dir()
