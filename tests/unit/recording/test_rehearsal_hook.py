"""What a rehearsal replaces in a server's processes, with modules that only look like the real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import runner.recording.hook
from runner.recording.events import ProcessRecord, read_processes

SITE = Path(runner.recording.hook.__file__).parent / "site"


def module(root: Path, name: str, text: str) -> None:
    """Write a module with its packages."""
    folder = root
    *packages, last = name.split(".")
    for package in packages:
        folder /= package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / f"{last}.py").write_text(text)


def start(root: Path, code: str) -> subprocess.Popen[str]:
    (root / "records").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": f"{SITE}:{root}",
            "DEEPGEMM_RECORD": str(root / "records"),
            "DEEPGEMM_REHEARSE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(root: Path, code: str) -> tuple[str, ProcessRecord]:
    child = start(root, code)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    (found,) = read_processes(root / "records")
    return out, found


def test_flashinfer_modules_do_nothing_and_are_counted(tmp_path: Path) -> None:
    module(
        tmp_path,
        "flashinfer.jit.core",
        "class JitSpec:\n"
        "    name = 'sampling'\n"
        "    def build_and_load(self):\n"
        "        raise RuntimeError('no compiler')\n",
    )
    out, found = run(
        tmp_path,
        "from flashinfer.jit.core import JitSpec\n"
        "module = JitSpec().build_and_load()\n"
        "made = module.init(4)\n"
        "print(module.run(1) + 0, list(module.run(2)), module['run'](3) > 0)\n"
        "print(made.run_gemm(5) + 0)\n"
        "print(module.get_max_active_clusters())\n",
    )
    assert out == "0 [] False\n0\n16\n"
    assert found.counts == {
        "bypass flashinfer sampling": 1,
        "bypass flashinfer sampling.init": 1,
        "bypass flashinfer sampling.run": 3,
        "bypass flashinfer sampling.run_gemm": 1,
        "bypass flashinfer sampling.get_max_active_clusters": 1,
    }


def test_flashinfer_generators_make_nothing(tmp_path: Path) -> None:
    module(tmp_path, "flashinfer.jit.fused_moe", "def gen_moe():\n    raise OSError('offline')\n")
    code = (
        "from flashinfer.jit import fused_moe as f\nprint(f.gen_moe().build_and_load().run() + 0)"
    )
    out, found = run(tmp_path, code)
    assert out == "0\n"
    assert found.counts == {"bypass flashinfer gen_moe": 1, "bypass flashinfer gen_moe.run": 1}


def test_sglang_compiles_only_the_modules_whose_tensors_it_needs(tmp_path: Path) -> None:
    module(
        tmp_path,
        "sglang.kernels.jit.utils.compile.loader",
        "def load_jit(*names):\n    return f'compiled {names[0]}'\n",
    )
    out, found = run(
        tmp_path,
        "from sglang.kernels.jit.utils.compile.loader import load_jit\n"
        "print(load_jit('dpsk_v4_compress_plan', 1), load_jit('topk', 2).run() + 0)\n",
    )
    assert out == "compiled dpsk_v4_compress_plan 0\n"
    assert found.counts == {"bypass sglang jit topk_2": 1, "bypass sglang jit topk_2.run": 1}


def test_scales_that_would_be_read_from_the_device_are_one(tmp_path: Path) -> None:
    module(
        tmp_path,
        "sglang.srt.layers.quantization.kv_cache",
        "class BaseKVCacheMethod:\n"
        "    def process_weights_after_loading(self, layer):\n"
        "        assert layer.k_scale > 0\n",
    )
    out, found = run(
        tmp_path,
        "from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod\n"
        "class Layer:\n    k_scale = 0\n"
        "layer = Layer()\n"
        "BaseKVCacheMethod().process_weights_after_loading(layer)\n"
        "print(layer.k_scale_float, layer.v_scale_float)\n",
    )
    assert out == "1.0 1.0\n"
    assert found.counts == {"bypass sglang KV cache scales: 1": 1}


def test_hook_that_does_not_fit_a_release_is_reported(tmp_path: Path) -> None:
    module(tmp_path, "vllm.v1.worker.gpu.model_runner", "answer = 42\n")
    out, found = run(tmp_path, "from vllm.v1.worker.gpu.model_runner import answer\nprint(answer)")
    assert out == "42\n"
    (name,) = found.counts
    assert name.startswith("not hooked vllm.v1.worker.gpu.model_runner: AttributeError(")


@pytest.mark.parametrize(
    ("call", "noted"),
    [
        ("warning('Failed to load x: falling back to y')", True),
        ("info('Falls back to Triton')", True),
        ("warning('FlashInfer is not available')", True),
        ("warning('all is well')", False),
        ("info('feature not available')", False),
        ("debug('fallback')", False),
    ],
)
def test_fallbacks_are_noted_from_the_log(tmp_path: Path, call: str, noted: bool) -> None:
    code = (
        "import logging\nlogging.basicConfig(level=10)\n"
        f"logging.getLogger('server').{call}\n"
        "logging.getLogger('server').error('it cannot')\n"
    )
    _, found = run(tmp_path, code)
    assert found.counts.pop("fallback it cannot") == 1
    assert bool(found.counts) == noted


def test_stacks_are_written_when_asked(tmp_path: Path) -> None:
    child = start(tmp_path, "print('up', flush=True)\nimport time\ntime.sleep(60)\n")
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    child.send_signal(signal.SIGUSR2)
    path = tmp_path / "records" / f"{child.pid}.stacks"
    while 'File "<string>"' not in path.read_text():
        assert child.poll() is None
    child.kill()
    child.communicate()
