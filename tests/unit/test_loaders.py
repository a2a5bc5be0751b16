"""Kernel loaders (the library's JIT and ours), and the compile locks of a node's ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from launch.loaders import CompileLocks, LibraryJit, OwnJit
from runner.errors import UserError
from runner.kernels.kernel import Kernel
from runner.kernels.rules import RULES
from runner.kernels.table import Demand
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape, steps_of
from runner.planning.plan import make_plan
from runner.schedule import Walk

DENSE = GemmShape(T.GEMM_NT_F8F8BF16, 512, 512, 1, 132)
DENSE_WALK = Walk(DENSE, steps_of(range(1, 129)))
CALL, OTHER = DENSE.call(1), DENSE.call(16384)
SCENARIO: Any = "the scenario"


@pytest.fixture(autouse=True)
def only_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.loaders.table_of", lambda scenario: RULES)
    monkeypatch.setattr(
        "launch.loaders.plan_of",
        lambda scenario: make_plan([Demand(DENSE, range(1, 16385))], RULES),
    )


def library_jit() -> LibraryJit:
    wrapper: Any = "wrapper"
    return LibraryJit(wrapper, SCENARIO)


def test_library_jit_walk_makes_its_kernels_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    walker = pytest.importorskip("runner.deep_gemm_wrapper.walker")
    walked: list[object] = []
    monkeypatch.setattr(walker, "walk_list", lambda *arguments: walked.append(arguments))
    jit = library_jit()
    assert not jit.is_ready(CALL)
    jit.walk(DENSE_WALK)
    assert walked == [("wrapper", DENSE_WALK)]
    assert jit.is_ready(CALL)
    assert not jit.is_ready(OTHER)


def test_library_jit_loads_only_new_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    walker = pytest.importorskip("runner.deep_gemm_wrapper.walker")
    asked: list[tuple[Kernel, GemmShape, int]] = []

    def call_each(wrapper: str, calls: list[tuple[Kernel, GemmShape, int]]) -> list[Kernel]:
        assert wrapper == "wrapper"
        asked.extend(calls)
        return [calls[0][0]]

    monkeypatch.setattr(walker, "call_each", call_each)
    first, second, third = (DENSE.call(m) for m in (1, 40, 16384))
    one, two, three = (RULES.kernels_of(call)[-1] for call in (first, second, third))
    jit = library_jit()
    jit.prepare(first)
    jit.load([one, two, three])
    assert [kernel for kernel, _, _ in asked] == [two, three]
    assert all(RULES.kernels_of(shape.call(m))[-1] == kernel for kernel, shape, m in asked)
    assert jit.is_ready(first) and jit.is_ready(second)
    assert not jit.is_ready(third), "kernels that call_each skipped are not ready"


def test_own_jit_walk_loads_kernels_in_order_of_first_m(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Kernel] = []
    monkeypatch.setattr("launch.loaders._load", lambda kernel, *_: made.append(kernel))
    unused: Any = "a compiler", "a cache"
    jit = OwnJit(RULES, *unused)
    assert not jit.is_ready(CALL)
    jit.walk(DENSE_WALK)
    assert made == list(RULES.kernel_ranges(DENSE, range(1, 129)))
    assert jit.is_ready(CALL)
    jit.prepare(OTHER)
    assert jit.is_ready(OTHER)
    assert len(made) == len(set(made))


def test_own_jit_without_a_compiler_is_always_ready() -> None:
    jit = OwnJit(RULES)
    jit.prepare(CALL)
    assert jit.is_ready(CALL)


def test_launch_command_line_can_be_imported_without_torch() -> None:
    """Otherwise it could not report that torch is missing."""
    code = "import sys; sys.modules['torch'] = None; import launch.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- locks ----------------------------------------------------------------------------------------


def can_be_taken(locks: CompileLocks, shape: GemmShape, within: float = 10) -> bool:
    """Whether another thread gets the lock within this many seconds."""
    taken = threading.Event()

    def take() -> None:
        with locks.held(shape):
            taken.set()

    threading.Thread(target=take, daemon=True).start()
    return taken.wait(within)


def test_compile_lock_has_one_holder_and_is_released_on_error(tmp_path: Path) -> None:
    mine, theirs = CompileLocks(tmp_path), CompileLocks(tmp_path)
    with mine.held(DENSE):
        assert not can_be_taken(theirs, DENSE, within=0.3)
    assert can_be_taken(theirs, DENSE)
    with pytest.raises(ValueError, match="a compile"), mine.held(DENSE):
        raise ValueError("a compile failed")
    assert can_be_taken(theirs, DENSE)


@pytest.mark.parametrize(
    "shape",
    [
        GemmShape(T.GEMM_NT_BF16BF16F32, 512, 512, 1, 132),
        GemmShape(T.GEMM_NT_F8F8BF16, 640, 512, 1, 132),
        GemmShape(T.GEMM_NT_F8F8BF16, 512, 256, 1, 132),
        GemmShape(T.GEMM_NT_F8F8BF16, 512, 512, 2, 132),
    ],
    ids=["type", "n", "k", "groups"],
)
def test_each_gemm_has_its_own_compile_lock(shape: GemmShape, tmp_path: Path) -> None:
    locks = CompileLocks(tmp_path)
    with locks.held(DENSE):
        assert can_be_taken(locks, shape)


def test_each_node_has_its_own_compile_locks(tmp_path: Path) -> None:
    with CompileLocks(tmp_path / "node0").held(DENSE):
        assert can_be_taken(CompileLocks(tmp_path / "node1"), DENSE)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("node0/**/*.lock")] == [
        "node0/locks/GEMM_NT_F8F8BF16_n512_k512_g1.lock"
    ]


HOLDER = """
import sys, time
from pathlib import Path
from launch.loaders import CompileLocks
from runner.kernels.table import Demand
from runner.kernels.types import DeepGemmKernelType as T
from runner.kernels.types import GemmShape
with CompileLocks(Path(sys.argv[1])).held(GemmShape(T.GEMM_NT_F8F8BF16, 512, 512, 1, 132)):
    print("held", flush=True)
    time.sleep(60)
"""


def test_compile_lock_is_released_when_its_holder_is_killed(tmp_path: Path) -> None:
    locks = CompileLocks(tmp_path)
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert not can_be_taken(locks, DENSE, within=0.3)
        os.kill(holder.pid, signal.SIGKILL)
    assert can_be_taken(locks, DENSE)


def test_unwritable_lock_folder_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        CompileLocks(tmp_path / "file")
    assert str(caught.value) == f"cannot make {tmp_path / 'file' / 'locks'}: Not a directory"
