"""``runner cache ls``, and input that every ``runner cache`` command refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest
from runner.kernels.installed import Library
from tests.unit.cache_cli import Capture, assert_prints, assert_refused, cache, plan_file
from tests.unit.small_cache import contents, small_library

pytestmark = pytest.mark.usefixtures("here")


def listed(manifest: Manifest, serving: Callable[[str], str]) -> list[str]:
    rows = []
    words = {
        "[[1, 16]]": "tile 16x32x128, 16 stages, 132 SMs",
        "[[17, 32]]": "tile 32x32x128, 16 stages, 132 SMs",
        "[[33, 64]]": "tile 64x32x128, 16 stages, 132 SMs",
        "[[1, 64]]": "8 scales a row",
    }
    for key in sorted(manifest.entries):
        name, m_ranges = manifest.entries[key].name, manifest.entries[key].uses[0]["m_ranges"]
        first, last = m_ranges[0]
        rows.append(f"{name}  {words[str(m_ranges)]}  20 KiB  {serving(f'{first}..{last}')}")
    return rows


def uses_at(m_range: str) -> str:
    return f"gemm_nt_f8f8bf16:4096:1024 M {m_range}"


def test_ls_lists_kernels_with_their_uses(
    made: tuple[KernelCache, Manifest], capsys: Capture
) -> None:
    cache_, manifest = made
    assert cache("ls", cache_.root) == 0
    assert_prints(
        capsys,
        *listed(manifest, uses_at),
        "4 kernels, 0.1 MiB; for sgl-deep-gemm 0.1.4.post1, nvcc 13.0, built for small",
    )


def test_ls_reads_the_manifest_of_the_writable_directory_in_a_list(
    directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert cache("ls", directory) == 0
    alone = capsys.readouterr().out
    assert cache("ls", f"{directory}:{tmp_path}/below") == 0
    assert capsys.readouterr().out == alone


@pytest.mark.parametrize(
    "command",
    [
        ["ls", ""],
        ["pack", "", "x.tar.gz"],
        ["relocate", "", "--to", "x"],
        ["unpack", "x.tar.gz", ""],
    ],
)
def test_empty_directory_is_refused(command: list[str], capsys: Capture) -> None:
    assert cache(*command) == 2
    said = "Invalid value for 'DIRECTORY': '' is not a path: it must not be empty"
    assert_refused(capsys, said)


def test_ls_without_manifest_does_not_know_uses(
    made: tuple[KernelCache, Manifest], capsys: Capture
) -> None:
    cache_, manifest = made
    (cache_.root / "manifest.json").unlink()
    assert cache("ls", cache_.root) == 0
    assert_prints(
        capsys,
        *listed(manifest, lambda m_range: "serves: not known"),
        "4 kernels, 0.1 MiB; no manifest",
    )


def test_ls_takes_uses_from_a_plan(
    made: tuple[KernelCache, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    """Kernels are matched to the plan by configuration, so it needs no cache keys."""
    cache_, manifest = made
    (cache_.root / "manifest.json").unlink()
    assert cache("ls", cache_.root, "--plan", plan_file(tmp_path / "p.json", None)) == 0
    assert_prints(capsys, *listed(manifest, uses_at), "4 kernels, 0.1 MiB; no manifest")


def test_ls_json_has_key_configuration_and_uses_of_each_kernel(
    made: tuple[KernelCache, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    cache_, manifest = made
    assert cache("ls", cache_.root, "--json", "-") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    data = json.loads(captured.out)
    assert data["version"] == 1
    assert [row["cache_key"] for row in data["kernels"]] == sorted(manifest.entries)
    planned = {
        item["cache_key"]: item
        for item in json.loads(
            plan_file(tmp_path / "p.json", small_library(tmp_path / "deep_gemm")).read_text()
        )["kernels"]
    }
    for row in data["kernels"]:
        item = planned[row["cache_key"]]
        assert (row["name"], row["config"]) == (item["name"], item["config"])
        assert (row["bytes"], row["uses"]) == (20 << 10, item["uses"])
        assert row["words"]
    assert cache("ls", cache_.root, "--json", tmp_path / "ls.json") == 0
    assert json.loads((tmp_path / "ls.json").read_text()) == data
    assert capsys.readouterr().out.endswith("built for small\n")


def test_ls_marks_folders_that_are_not_kernels(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "odd" / "cache"
    (folder / "kernel.gemm.12").mkdir(parents=True)
    (folder / "kernel.gemm.12" / "kernel.cu").write_bytes(b"\xff" * 2048)
    (folder / "notes").mkdir()
    assert cache("ls", folder.parent) == 0
    assert_prints(
        capsys,
        "kernel.gemm.12  not a generated kernel  2 KiB  serves: not known",
        "notes  not a generated kernel  0 KiB  serves: not known",
        "2 kernels, 0.0 MiB; no manifest",
    )


def test_ls_of_empty_cache_lists_nothing(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "cache").mkdir()
    assert cache("ls", tmp_path) == 0
    assert_prints(capsys, "0 kernels, 0.0 MiB; no manifest")


# Invalid caches, plans and manifests

COMMANDS = [
    ["ls"],
    ["verify"],
    ["relocate", "--target-root", "/x"],
    ["pack"],
    ["prune"],
]


def with_rest(command: list[str], directory: Path, tmp_path: Path, plan: Path) -> list[str | Path]:
    rest: dict[str, list[str | Path]] = {
        "pack": [tmp_path / "x.tar.gz"],
        "prune": ["--plan", plan],
        "relocate": ["--to", tmp_path / "moved"],
    }
    return [*command, directory, *rest.get(command[0], [])]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("name", ["nowhere", "deep_gemm"])
def test_commands_refuse_a_folder_that_is_not_a_cache(
    command: list[str], name: str, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    plan = plan_file(tmp_path / "plan.json", here)
    folder = tmp_path / name
    assert cache(*with_rest(command, folder, tmp_path, plan)) == 2
    assert_refused(capsys, f"{folder} is not a kernel cache: it has no folder named cache")
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "moved").exists()
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_commands_refuse_a_file_as_a_cache(
    command: list[str], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    plan = plan_file(tmp_path / "plan.json", here)
    assert cache(*with_rest(command, plan, tmp_path, plan)) == 2
    assert_refused(capsys, f"Invalid value for 'DIRECTORY': Directory '{plan}' is a file.")


@pytest.mark.parametrize(
    "command",
    [*(each for each in COMMANDS if each[0] != "prune"), ["prune", "--yes"]],
    ids=lambda words: words[0],
)
def test_commands_refuse_an_invalid_manifest(
    command: list[str], directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    plan = plan_file(tmp_path / "plan.json", here, max_m=16)
    (directory / "manifest.json").write_text("{}")
    before = contents(directory)
    assert cache(*with_rest(command, directory, tmp_path, plan)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {directory}/manifest.json is not a manifest: ")
    assert captured.err.count("\n") == 1
    assert contents(directory) == before


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["prune"], ["prune", "--yes"]])
def test_commands_refuse_a_file_that_is_not_a_plan(
    command: list[str], directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = contents(directory)
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    assert cache(*command, directory, "--plan", bad) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {bad} is not a plan from runner plan --json: ")
    assert captured.err.count("\n") == 1
    assert cache(*command, directory, "--plan", tmp_path / "gone.json") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and f"{tmp_path}/gone.json" in err and err.count("\n") == 1
    assert contents(directory) == before


@pytest.mark.parametrize("command", [["verify"], ["prune"], ["prune", "--yes"]])
def test_verify_and_prune_refuse_a_plan_without_keys(
    command: list[str], directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = contents(directory)
    plan = plan_file(tmp_path / "plan.json", None)
    assert cache(*command, directory, "--plan", plan) == 2
    assert_refused(
        capsys, "the plan has no cache keys: make it where deep_gemm's headers are installed"
    )
    assert contents(directory) == before


def test_unknown_cache_command_is_refused(capsys: Capture) -> None:
    assert cache("move") == 2
    assert_refused(capsys, "No such command 'move'.")
