"""``runner cache verify``: every problem, and bad targets."""

from pathlib import Path

import pytest

from runner.jit.cache import KernelCache
from runner.jit.library import Library
from runner.jit.store.manifest import Manifest
from tests.unit.cache_cli import ELSEWHERE, ROOT, Capture, cache, plan_file, refuses, says
from tests.unit.elf import tiny_cubin
from tests.unit.kept_cache import remove
from tests.unit.small_cache import contents

pytestmark = pytest.mark.usefixtures("here")


def test_verify(directory: Path, tmp_path: Path, here: Library, capsys: Capture) -> None:
    before = contents(directory)
    plan = plan_file(tmp_path / "plan.json", here)
    assert cache("verify", directory) == 0
    says(capsys, f"{directory} is whole: checked 4 entries, manifest, headers")
    assert cache("verify", directory, "--plan", plan) == 0
    says(capsys, f"{directory} is whole: checked 4 entries, manifest, plan, headers")
    (directory / "manifest.json").unlink()
    assert cache("verify", directory, "--plan", plan) == 0
    says(capsys, f"{directory} is whole: checked 4 entries, plan, headers")
    assert cache("verify", directory) == 0
    says(capsys, f"{directory} is whole: checked 4 entries, headers")
    assert cache("verify", directory, "--target-root", ROOT) == 0
    says(capsys, f"{directory} is whole: checked 4 entries, headers")
    del before["manifest.json"]
    assert contents(directory) == before


def test_verify_without_a_library(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.cli.cache.find_library", lambda: None)
    assert cache("verify", directory) == 0
    says(capsys, f"{directory} is whole: checked 4 entries, manifest")


def test_verify_tells_every_problem(made: tuple[KernelCache, Manifest], capsys: Capture) -> None:
    cache_, manifest = made
    missing, half, changed, _ = sorted(manifest.entries)
    remove(cache_.entry(missing))
    (cache_.entry(half) / "kernel.cubin").unlink()
    (cache_.entry(changed) / "kernel.cubin").write_bytes(tiny_cubin(b"other"))
    cache_.entry("notes.txt").write_text("")
    assert cache("verify", cache_.root) == 1
    says(
        capsys,
        f"missing: {missing} is not in the cache",
        f"truncated: {half} kernel.cubin is missing: the library aborts on this entry",
        f"changed: {changed} kernel.cubin is not what was built",
        "foreign: notes.txt is not a kernel's folder",
        err=f"error: {cache_.root}: 1 missing, 1 truncated, 1 changed, 1 foreign\n",
    )


def test_verify_shows_the_first_twenty(directory: Path, capsys: Capture) -> None:
    for number in range(23):
        (directory / "cache" / f"note{number:02}").write_text("")
    assert cache("verify", directory) == 1
    says(
        capsys,
        *(f"foreign: note{number:02} is not a kernel's folder" for number in range(20)),
        "... and 3 more",
        err=f"error: {directory}: 23 foreign\n",
    )


@pytest.mark.parametrize(
    "target", [["--target-root", str(ELSEWHERE)], ["--target-root", ROOT, "--cuda-version", "13.1"]]
)
def test_verify_for_another_machine(
    target: list[str], made: tuple[KernelCache, Manifest], capsys: Capture
) -> None:
    assert cache("verify", made[0].root, *target) == 1
    says(
        capsys,
        *(f"wrong key: {key} is not this source's key for this compiler and path"
          for key in sorted(made[1].entries)),
        err=f"error: {made[0].root}: 4 wrong key\n",
    )  # fmt: skip


def test_verify_misses_what_a_plan_needs(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    cache_, manifest = made
    (cache_.root / "manifest.json").unlink()
    lacking = sorted(manifest.entries)[0]
    remove(cache_.entry(lacking))
    plan = plan_file(tmp_path / "plan.json", here)
    assert cache("verify", cache_.root, "--plan", plan) == 1
    says(
        capsys, f"missing: {lacking} is not in the cache", err=f"error: {cache_.root}: 1 missing\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cuda-version", "13"], "--cuda-version '13' must be X.Y, such as 13.0"),
        (["--target-root", "here"],
         "--target-root here must be an absolute path: the key holds it"),
        (["--cuda-version", "11.8"],
         "--cuda-version 11.8 is too old: 12.9 or newer is needed"),
    ],
)  # fmt: skip
def test_bad_targets(
    arguments: list[str], words: str, directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = contents(directory)
    assert cache("verify", directory, *arguments) == 2
    refuses(capsys, words)
    root = [] if "--target-root" in arguments else ["--target-root", ROOT]
    assert cache("relocate", directory, "--to", tmp_path / "moved", *root, *arguments) == 2
    refuses(capsys, words)
    assert not (tmp_path / "moved").exists()
    assert contents(directory) == before


def test_another_release_alone_names_no_machine(directory: Path, capsys: Capture) -> None:
    assert cache("verify", directory, "--cuda-version", "13.1") == 2
    refuses(capsys, "--cuda-version needs --target-root here: keys hold both")
