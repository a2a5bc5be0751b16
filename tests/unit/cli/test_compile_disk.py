"""``runner compile`` on full disks, with unusable locks, and with broken progress output."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runner.build import prebuild as prebuild_module
from runner.build.compiler import NvccCompiler
from runner.build.prebuild import BuildRequest, prebuild
from runner.cache.kernel_cache import KernelCache
from runner.cache.manifest import Manifest, read_manifest
from runner.config.environ import Environ
from runner.errors import UserError, WorkFailedError
from runner.kernels.entry import kernels_in
from runner.kernels.installed import Library
from runner.kernels.keys import first_recipe
from tests.unit.build_machine import (
    GEMM,
    BuildMachine,
    assert_manifest_names_all,
    assert_whole,
    error_line,
    plan,
)
from tests.unit.elf import tiny_cubin


def request_for(machine: BuildMachine) -> BuildRequest:
    library = Library(machine.root / "deep_gemm")
    compiler = NvccCompiler(machine.root / "nvcc" / "nvcc", library, first_recipe(Environ()))
    return BuildRequest(plan(), "four", compiler.keys, compiler, machine.cache, 1, dict(os.environ))


def fill_disk_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    put = KernelCache.put
    added: list[str] = []

    def limited(self: KernelCache, key: str, *arguments: Any, **options: Any) -> bool:
        if len(added) == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        added.append(key)
        return put(self, key, *arguments, **options)

    monkeypatch.setattr(KernelCache, "put", limited)


def test_full_disk_keeps_finished_kernels_and_next_build_resumes(
    machine: BuildMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as limited:
        fill_disk_after(limited, 2)
        with pytest.raises(WorkFailedError) as caught:
            prebuild(request_for(machine))
    assert str(caught.value) == (
        "the build stopped after 2 of 4 kernels: No space left on device; "
        "finished kernels are kept, run it again to go on"
    )
    assert_whole(machine, 2)
    assert_manifest_names_all(machine)
    report = prebuild(request_for(machine))
    assert (report.planned, report.present, report.built, report.failed) == (4, 2, 2, [])
    assert_whole(machine, 4)


def test_disk_too_full_for_the_manifest_is_an_error(
    machine: BuildMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fill_disk_after(monkeypatch, 2)
    monkeypatch.setattr(prebuild_module, "merge_manifest", full)
    with pytest.raises(WorkFailedError, match="No space left on device"):
        prebuild(request_for(machine))


def test_lock_file_that_cannot_be_opened_is_an_error(machine: BuildMachine) -> None:
    (machine.cache.root / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"/dg: Is a directory$"):
        prebuild(request_for(machine))


def test_build_without_file_locks_warns_and_keeps_foreign_scratch(
    machine: BuildMachine, no_locks: None
) -> None:
    other = machine.cache.root / "tmp" / "build-4711"
    other.mkdir(parents=True)
    with pytest.warns(UserWarning, match="has no file locks"):
        assert prebuild(request_for(machine)).built == 4
    assert_whole(machine, 4)
    assert other.exists()


def test_exception_in_progress_callback_is_reported_as_failed_build(
    machine: BuildMachine,
) -> None:
    def broken(done: int, total: int, fraction: float) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    with pytest.raises(WorkFailedError, match=r" of 4 kernels: Broken pipe; "):
        prebuild(request_for(machine), progress=broken)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size; skips where mounting is not possible."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def build_on_small_disk(machine: BuildMachine, disk: Path) -> Manifest | None:
    """Build four kernels where two fit, check what remains, and return the manifest."""
    (machine.root / "nvcc" / "kernel.cubin").write_bytes(tiny_cubin(bytes(100_000)))
    cache = KernelCache(disk / "dg")
    done = machine.run(*GEMM, "--cache-dir", str(cache.root), "--jobs", "1")
    for entry in cache.entries():
        assert kernels_in((entry / "kernel.cubin").read_bytes()) == {"kernel": bytes(100_000)}
    assert len(cache.entries()) == 2
    assert list((cache.root / "tmp").iterdir()) == []
    assert error_line(done, 1) == (
        "the build stopped after 2 of 4 kernels: No space left on device; "
        "finished kernels are kept, run it again to go on"
    )
    return read_manifest(cache.root)


def test_build_on_full_file_system_writes_manifest_of_finished_kernels(
    machine: BuildMachine,
) -> None:
    with small_disk(machine.root / "disk", "300k") as disk:
        manifest = build_on_small_disk(machine, disk)
        assert manifest is not None
        assert sorted(manifest.entries) == [
            path.name for path in KernelCache(disk / "dg").entries()
        ]


def test_build_on_file_system_without_room_for_manifest_has_none(machine: BuildMachine) -> None:
    page = 4  # a kernel is a page of source and 25 of machine code
    with small_disk(machine.root / "disk", f"{2 * 26 * page}k") as disk:
        assert build_on_small_disk(machine, disk) is None
