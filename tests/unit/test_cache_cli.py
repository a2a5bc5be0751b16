"""``runner cache``: what it prints, how it ends, and what it leaves on disk."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.cli import main
from runner.jit.cache import KernelCache
from runner.jit.library import Library
from runner.jit.plan_json import plan_to_json
from runner.jit.store.manifest import Manifest, read_manifest, sha256, write_manifest
from tests.unit.elf import tiny_cubin
from tests.unit.small_cache import INCLUDE, contents, fill, keys_for, small_library, small_plan

Capture = pytest.CaptureFixture[str]
ROOT = str(INCLUDE.parent)
ELSEWHERE = Path("/opt/other/deep_gemm")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """A small library and an nvcc of release 13.0 in place of what is installed."""
    library = small_library(tmp_path / "deep_gemm")
    monkeypatch.setattr("runner.cli.cache.find_library", lambda: library)
    monkeypatch.setattr("runner.cli.deployment.find_library", lambda: library)
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(fake_nvcc))
    return library


@pytest.fixture
def made(tmp_path: Path, here: Library) -> tuple[KernelCache, Manifest]:
    return fill(tmp_path / "made", keys_for(here))


@pytest.fixture
def directory(made: tuple[KernelCache, Manifest]) -> Path:
    return made[0].root


def plan_file(path: Path, library: Library | None, max_m: int = 64, **values: Any) -> Path:
    keys = None if library is None else keys_for(library, **values)
    path.write_text(json.dumps({**plan_to_json(small_plan(max_m), keys), "for": "a plan"}))
    return path


def cache(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["cache", *map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def says(capsys: Capture, *lines: str, err: str = "") -> None:
    captured = capsys.readouterr()
    assert (captured.out.splitlines(), captured.err) == (list(lines), err)


def refuses(capsys: Capture, line: str) -> None:
    says(capsys, err=f"error: {line}\n")


def drop(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


# ls


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
        rows.append(f"{name}  {words[str(m_ranges)]}  20 KB  {serving(f'{first}..{last}')}")
    return rows


def uses_at(m_range: str) -> str:
    return f"gemm_nt_f8f8bf16:4096:1024 M {m_range}"


def test_ls(made: tuple[KernelCache, Manifest], capsys: Capture) -> None:
    cache_, manifest = made
    assert cache("ls", cache_.root) == 0
    says(
        capsys,
        *listed(manifest, uses_at),
        "4 kernels, 0.1 MB; for sgl-deep-gemm 0.1.4.post1, NVCC13.0, built for small",
    )


def test_ls_without_a_manifest(made: tuple[KernelCache, Manifest], capsys: Capture) -> None:
    cache_, manifest = made
    (cache_.root / "manifest.json").unlink()
    assert cache("ls", cache_.root) == 0
    says(
        capsys,
        *listed(manifest, lambda m_range: "serves: not known"),
        "4 kernels, 0.1 MB; no manifest",
    )


def test_ls_takes_the_m_of_a_plan(
    made: tuple[KernelCache, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    """A plan tells what kernels serve by their configuration, so it needs no keys."""
    cache_, manifest = made
    (cache_.root / "manifest.json").unlink()
    assert cache("ls", cache_.root, "--plan", plan_file(tmp_path / "p.json", None)) == 0
    says(capsys, *listed(manifest, uses_at), "4 kernels, 0.1 MB; no manifest")


def test_ls_as_json(made: tuple[KernelCache, Manifest], tmp_path: Path, capsys: Capture) -> None:
    cache_, manifest = made
    assert cache("ls", cache_.root, "--json", "-") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    data = json.loads(captured.out)
    assert data["version"] == 1
    assert [row["cache_key"] for row in data["kernels"]] == sorted(manifest.entries)
    planned = {item["cache_key"]: item for item in json.loads(
        plan_file(tmp_path / "p.json", small_library(tmp_path / "deep_gemm")).read_text()
    )["kernels"]}  # fmt: skip
    for row in data["kernels"]:
        item = planned[row["cache_key"]]
        assert (row["name"], row["config"]) == (item["name"], item["config"])
        assert (row["bytes"], row["uses"]) == (20 << 10, item["uses"])
        assert row["words"]
    assert cache("ls", cache_.root, "--json", tmp_path / "ls.json") == 0
    assert json.loads((tmp_path / "ls.json").read_text()) == data
    assert capsys.readouterr().out.endswith("built for small\n")


def test_ls_of_what_is_no_kernel(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "odd" / "cache"
    (folder / "kernel.gemm.12").mkdir(parents=True)
    (folder / "kernel.gemm.12" / "kernel.cu").write_bytes(b"\xff" * 2048)
    (folder / "notes").mkdir()
    assert cache("ls", folder.parent) == 0
    says(
        capsys,
        "gemm  not a generated kernel  2 KB  serves: not known",
        "notes  not a generated kernel  0 KB  serves: not known",
        "2 kernels, 0.0 MB; no manifest",
    )


def test_ls_of_an_empty_cache(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "cache").mkdir()
    assert cache("ls", tmp_path) == 0
    says(capsys, "0 kernels, 0.0 MB; no manifest")


# What is no cache, no plan, no manifest


COMMANDS = [
    ["ls"], ["verify"], ["relocate", "--target-root", "/x"], ["pack"], ["prune"],
]  # fmt: skip


def with_rest(command: list[str], directory: Path, tmp_path: Path, plan: Path) -> list[str | Path]:
    rest: dict[str, list[str | Path]] = {
        "pack": [tmp_path / "x.tar.gz"], "prune": ["--plan", plan],
        "relocate": ["--to", tmp_path / "moved"],
    }  # fmt: skip
    return [*command, directory, *rest.get(command[0], [])]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("name", ["nowhere", "deep_gemm"])
def test_what_is_no_cache(
    command: list[str], name: str, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    plan = plan_file(tmp_path / "plan.json", here)
    folder = tmp_path / name
    assert cache(*with_rest(command, folder, tmp_path, plan)) == 2
    refuses(capsys, f"{folder} is not a kernel cache: it has no folder named cache")
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "moved").exists()
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_a_file_is_no_cache(
    command: list[str], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    plan = plan_file(tmp_path / "plan.json", here)
    assert cache(*with_rest(command, plan, tmp_path, plan)) == 2
    refuses(capsys, f"Invalid value for 'DIRECTORY': Directory '{plan}' is a file.")


@pytest.mark.parametrize(
    "command",
    [*(each for each in COMMANDS if each[0] != "prune"), ["prune", "--yes"]],
    ids=lambda words: words[0],
)
def test_a_bad_manifest(
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


@pytest.mark.parametrize("values", [{"plans": 3}, {"plans": [3]}])
def test_a_manifest_of_wrong_types(
    values: dict[str, Any], directory: Path, capsys: Capture
) -> None:
    data = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**data, **values}))
    assert cache("ls", directory) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["prune"], ["prune", "--yes"]])
def test_what_is_no_plan(
    command: list[str], directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = contents(directory)
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    assert cache(*command, directory, "--plan", bad) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {bad} is not a plan of runner plan --json: ")
    assert captured.err.count("\n") == 1
    assert cache(*command, directory, "--plan", tmp_path / "gone.json") == 2
    refuses(capsys, f"Invalid value for '--plan': File '{tmp_path}/gone.json' does not exist.")
    assert contents(directory) == before


@pytest.mark.parametrize("command", [["verify"], ["prune"], ["prune", "--yes"]])
def test_a_plan_without_keys(
    command: list[str], directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = contents(directory)
    plan = plan_file(tmp_path / "plan.json", None)
    assert cache(*command, directory, "--plan", plan) == 2
    refuses(capsys, "the plan has no cache keys: make it where deep_gemm's headers are installed")
    assert contents(directory) == before


# verify


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
    drop(cache_.entry(missing))
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
    drop(cache_.entry(lacking))
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


# relocate


def placed_line(target: Path, placed: int, present: int, signature: str = "NVCC13.0") -> str:
    return (
        f"{placed} kernels placed in {target} for {ELSEWHERE} and {signature}, {present} were there"
    )


def counted(captured: str, what: str, total: int) -> None:
    (line,) = captured.splitlines()
    assert line.startswith(f"{what}: {total} of {total}, ")


@pytest.mark.parametrize("release", [[], ["--cuda-version", "13.1"]])
def test_relocate_to_another_directory(
    release: list[str], directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    before = contents(directory)
    target = tmp_path / "target"
    command = ["relocate", directory, "--target-root", ELSEWHERE, "--to", target, *release]
    signature = "NVCC13.1" if release else "NVCC13.0"
    assert cache(*command) == 0
    captured = capsys.readouterr()
    assert captured.out == placed_line(target, 4, 0, signature) + "\n"
    counted(captured.err, "relocate", 4)
    keys = keys_for(here, ELSEWHERE / "include", signature)
    manifest = read_manifest(target)
    assert manifest is not None
    assert set(manifest.entries) == {keys.cache_key(item.kernel) for item in small_plan().kernels}
    assert contents(directory) == before
    assert cache("verify", target, "--target-root", ELSEWHERE, *release) == 0
    says(capsys, f"{target} is whole: checked 4 entries, manifest, headers")
    assert cache(*command) == 0
    assert capsys.readouterr().out == placed_line(target, 0, 4, signature) + "\n"


def test_relocate_needs_a_directory(directory: Path, capsys: Capture) -> None:
    before = contents(directory)
    assert cache("relocate", directory, "--target-root", ELSEWHERE) == 2
    refuses(capsys, "Missing option '--to'.")
    assert contents(directory) == before


@pytest.mark.parametrize("name", ["made", "made/../made", "link"])
@pytest.mark.parametrize("root", [ROOT, str(ELSEWHERE)])
def test_relocate_needs_another_directory(
    name: str, root: str, directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "link").symlink_to(directory)
    before = contents(directory)
    to = tmp_path / name
    assert cache("relocate", directory, "--target-root", root, "--to", to) == 2
    refuses(capsys, f"--to {to} must be another directory: a cache is for one machine")
    assert contents(directory) == before


def test_relocate_refuses_unsound_entries(
    made: tuple[KernelCache, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    cache_, manifest = made
    key = min(manifest.entries)
    (cache_.entry(key) / "kernel.cubin").write_bytes(tiny_cubin(b"other"))
    target = tmp_path / "target"
    assert cache("relocate", cache_.root, "--target-root", ELSEWHERE, "--to", target) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"changed: {key} kernel.cubin is not what was built",
        placed_line(target, 3, 0),
    ]
    assert captured.err.splitlines()[-1] == "error: 1 entries could not be relocated"


def test_relocate_tells_of_missing_entries(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    cache_, manifest = made
    drop(cache_.entry(min(manifest.entries)))
    target = tmp_path / "target"
    assert cache("relocate", cache_.root, "--target-root", ELSEWHERE, "--to", target) == 1


def test_relocate_without_a_target(directory: Path, tmp_path: Path, capsys: Capture) -> None:
    assert cache("relocate", directory, "--to", tmp_path / "moved") == 2
    refuses(capsys, "--target-root PATH is needed: where deep_gemm lies on that machine")


def test_relocate_to_an_older_release(directory: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "target"
    arguments = ["--target-root", ELSEWHERE, "--to", target, "--cuda-version", "12.9"]
    assert cache("relocate", directory, *arguments) == 2
    refuses(
        capsys,
        "the cache was built with CUDA 13.0 and cannot go to CUDA 12.9: a driver need not load "
        "what a newer compiler made; build it with nvcc 12.9",
    )
    assert contents(target) == {}


@pytest.mark.parametrize("given", [[], ["--from-root", ROOT], ["--from-cuda", "13.0"]])
def test_relocate_without_a_manifest_needs_to_be_told(
    given: list[str], directory: Path, tmp_path: Path, capsys: Capture
) -> None:
    (directory / "manifest.json").unlink()
    target = ["--target-root", ELSEWHERE, "--to", tmp_path / "moved"]
    assert cache("relocate", directory, *target, *given) == 2
    refuses(
        capsys,
        f"{directory} has no manifest: say what it was built for with --from-root PATH and "
        "--from-cuda X.Y",
    )


def test_relocate_without_a_manifest(
    directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    (directory / "manifest.json").unlink()
    target = tmp_path / "target"
    origin = ["--from-root", ROOT, "--from-cuda", "13.0"]
    assert cache("relocate", directory, "--target-root", ELSEWHERE, "--to", target, *origin) == 0
    assert capsys.readouterr().out == placed_line(target, 4, 0) + "\n"
    keys = keys_for(here, ELSEWHERE / "include")
    assert {path.name for path in KernelCache(target).entries()} == {
        keys.cache_key(item.kernel) for item in small_plan().kernels
    }
    assert cache("verify", target) == 0


def test_relocate_from_a_root_that_it_was_not(
    made: tuple[KernelCache, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    cache_, manifest = made
    (cache_.root / "manifest.json").unlink()
    origin = ["--from-root", "/srv", "--from-cuda", "13.0"]
    target = ["--target-root", ELSEWHERE, "--to", tmp_path / "target"]
    assert cache("relocate", cache_.root, *target, *origin) == 1
    says(
        capsys,
        *(f"wrong key: {key} is not this source's key for this compiler and path"
          for key in sorted(manifest.entries)),
        placed_line(tmp_path / "target", 0, 0),
        err="error: 4 entries could not be relocated\n",
    )  # fmt: skip


def test_relocate_into_another_machines_cache_places_nothing(
    directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    target = tmp_path / "target"
    fill(target, keys_for(here, Path("/opt/third/include")))
    before = contents(target)
    assert cache("relocate", directory, "--target-root", ELSEWHERE, "--to", target) == 2
    assert "was built for another machine" in capsys.readouterr().err
    assert contents(target) == before


def test_relocate_without_headers(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("runner.cli.deployment.find_library", lambda: None)
    target = ["--target-root", ELSEWHERE, "--to", tmp_path / "moved"]
    assert cache("relocate", directory, *target) == 2
    refuses(
        capsys,
        "deep_gemm's headers are missing: pip install --no-deps sgl-deep-gemm==0.1.4.post1",
    )


# pack and unpack


@pytest.fixture
def archive(directory: Path, tmp_path: Path, capsys: Capture) -> Path:
    path = tmp_path / "x.tar.gz"
    assert cache("pack", directory, path) == 0
    says(capsys, f"{path}: 4 kernels, 0.0 MB")
    return path


def test_pack_and_unpack(archive: Path, directory: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "deep" / "target"
    assert cache("unpack", archive, target) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{target}: 4 kernels placed, 0 were there\n"
    counted(captured.err, "unpack", 4)
    assert contents(target) == contents(directory)
    assert cache("verify", target) == 0
    assert cache("pack", target, tmp_path / "y.tar.gz") == 0
    assert (tmp_path / "y.tar.gz").read_bytes() == archive.read_bytes()
    capsys.readouterr()
    assert cache("unpack", archive, target) == 0
    assert capsys.readouterr().out == f"{target}: 0 kernels placed, 4 were there\n"


def test_unpack_beside_other_kernels(
    archive: Path, made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library,
    capsys: Capture,
) -> None:  # fmt: skip
    target = tmp_path / "target"
    few, _ = fill(target, keys_for(here), small_plan(max_m=16).kernels)
    manifest = read_manifest(target)
    assert manifest is not None
    write_manifest(target, replace(manifest, plans=["few"]))
    assert cache("unpack", archive, target) == 0
    assert capsys.readouterr().out == f"{target}: 2 kernels placed, 2 were there\n"
    merged = read_manifest(target)
    assert merged is not None and merged.plans == ["few", "small"]
    assert set(merged.entries) == set(made[1].entries)
    assert cache("verify", few.root) == 0


def test_unpacked_beside_another_build_the_cache_is_whole(
    archive: Path, made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library
) -> None:
    """The same key, another nvcc build: its entry stays, and the manifest must say so."""
    target = tmp_path / "target"
    other, manifest = fill(target, keys_for(here), small_plan().kernels[:1])
    (key,) = manifest.entries
    cubin = tiny_cubin(b"another build")
    (other.entry(key) / "kernel.cubin").write_bytes(cubin)
    manifest.entries[key] = replace(  # type: ignore[index]
        manifest.entries[key], cubin_sha256=sha256(cubin), cubin_bytes=len(cubin)
    )
    write_manifest(target, manifest)
    assert cache("verify", target) == 0
    assert cache("unpack", archive, target) == 0
    assert cache("verify", target) == 0


def test_unpack_into_another_machines_cache_places_nothing(
    archive: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    target = tmp_path / "target"
    fill(target, keys_for(here, ELSEWHERE / "include"))
    before = contents(target)
    assert cache("unpack", archive, target) == 2
    assert "was built for another machine" in capsys.readouterr().err
    assert contents(target) == before


def test_unpack_what_is_no_archive(tmp_path: Path, directory: Path, capsys: Capture) -> None:
    before = contents(directory)
    gone = tmp_path / "gone.tar.gz"
    assert cache("unpack", gone, tmp_path / "target") == 2
    refuses(capsys, f"{gone} is not a file: it must be an archive of runner cache pack")
    assert not (tmp_path / "target").exists()
    text = tmp_path / "text.tar.gz"
    text.write_text("no archive")
    assert cache("unpack", text, directory) == 2
    refuses(capsys, f"cannot read {text}: not a gzip file")
    assert contents(directory) == before


def test_pack_without_a_manifest(directory: Path, tmp_path: Path, capsys: Capture) -> None:
    (directory / "manifest.json").unlink()
    assert cache("pack", directory, tmp_path / "x.tar.gz") == 2
    refuses(capsys, f"{directory} has no manifest: build it with runner compile")
    assert not (tmp_path / "x.tar.gz").exists()


def test_pack_of_half_an_entry(
    made: tuple[KernelCache, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    cache_, manifest = made
    half = cache_.entry(min(manifest.entries))
    (half / "kernel.cu").unlink()
    assert cache("pack", cache_.root, tmp_path / "x.tar.gz") == 2
    refuses(
        capsys,
        f"corrupted cache entry {half}: kernel.cu or kernel.cubin is missing; remove it",
    )


def test_a_cache_that_cannot_be_locked(
    directory: Path, tmp_path: Path, here: Library, capsys: Capture
) -> None:
    """As in a read-only image, where even root may not write: reading is enough to pack."""
    (directory / ".lock").mkdir()
    plan = plan_file(tmp_path / "plan.json", here)
    assert cache("pack", directory, tmp_path / "x.tar.gz") == 0
    assert cache("prune", directory, "--plan", plan) == 0
    capsys.readouterr()
    assert cache("prune", directory, "--plan", plan, "--yes") == 2
    assert capsys.readouterr().err == f"error: cannot lock {directory}: Is a directory\n"


# prune


def going(manifest: Manifest, tmp_path: Path, here: Library) -> tuple[Path, list[str]]:
    """A plan of M up to 16 and the kernels that it does not need."""
    keys = keys_for(here)
    kept = {keys.cache_key(item.kernel) for item in small_plan(max_m=16).kernels}
    plan = plan_file(tmp_path / "few.json", here, max_m=16)
    return plan, sorted(set(manifest.entries) - kept)


def test_prune_only_tells(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    cache_, manifest = made
    plan, keys = going(manifest, tmp_path, here)
    before = contents(cache_.root)
    assert cache("prune", cache_.root, "--plan", plan) == 0
    says(
        capsys,
        *(f"would remove {key}" for key in keys),
        "2 kernels would go, 0.0 MB; 2 stay (--yes removes them)",
    )
    assert contents(cache_.root) == before


def test_prune_removes(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    cache_, manifest = made
    plan, keys = going(manifest, tmp_path, here)
    cache_.entry("notes.txt").write_text("mine")
    assert cache("prune", cache_.root, "--plan", plan, "--yes") == 0
    says(
        capsys,
        *(f"remove {key}" for key in keys),
        "2 kernels removed, 0.0 MB; 2 stay",
    )
    assert {path.name for path in cache_.entries()} == {
        "notes.txt", *(set(manifest.entries) - set(keys)),
    }  # fmt: skip
    assert read_manifest(cache_.root) == manifest.without(set(keys))
    (cache_.root / "cache" / "notes.txt").unlink()
    assert cache("verify", cache_.root, "--plan", plan) == 0


def test_prune_keeps_what_any_plan_needs(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    cache_, manifest = made
    plan, _ = going(manifest, tmp_path, here)
    whole = plan_file(tmp_path / "all.json", here)
    before = contents(cache_.root)
    assert cache("prune", cache_.root, "--plan", plan, "--plan", whole, "--yes") == 0
    says(capsys, "0 kernels removed, 0.0 MB; 4 stay")
    assert contents(cache_.root) == before


@pytest.mark.parametrize("yes", [[], ["--yes"]])
@pytest.mark.parametrize(
    "values", [{"include_path": ELSEWHERE / "include"}, {"signature": "NVCC13.1"}],
    ids=["path", "compiler"],
)  # fmt: skip
def test_prune_refuses_a_plan_for_another_machine(
    values: dict[str, Any], yes: list[str], directory: Path, tmp_path: Path, here: Library,
    capsys: Capture,
) -> None:  # fmt: skip
    before = contents(directory)
    ours = plan_file(tmp_path / "ours.json", here)
    theirs = plan_file(tmp_path / "theirs.json", here, **values)
    assert cache("prune", directory, "--plan", ours, "--plan", theirs, *yes) == 2
    refuses(
        capsys,
        f"the plan of a plan is for another machine than {directory}: make it with the "
        "--target-root and --cuda-version that the cache was built with",
    )
    assert contents(directory) == before


def test_prune_counts_only_wanted_kernels_as_staying(
    made: tuple[KernelCache, Manifest], tmp_path: Path, here: Library, capsys: Capture
) -> None:
    cache_, manifest = made
    plan, keys = going(manifest, tmp_path, here)
    drop(cache_.entry(next(key for key in manifest.entries if key not in keys)))
    cache_.entry("folder").mkdir()
    assert cache("prune", cache_.root, "--plan", plan) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "2 kernels would go, 0.0 MB; 1 stay (--yes removes them)"
    )


def test_prune_needs_a_plan(directory: Path, capsys: Capture) -> None:
    assert cache("prune", directory) == 2
    refuses(capsys, "Missing option '--plan'.")


# The group itself


def test_cache_without_a_command(capsys: Capture) -> None:
    assert cache("move") == 2
    refuses(capsys, "No such command 'move'.")
