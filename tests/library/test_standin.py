"""Unmodified torch with CUDA on the stand-in GPU.

DEEPGEMM_COLDSTART_LIBRARY_PYTHON names the interpreter with torch.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runner.standin.build import FAILURES, standin_environment
from runner.standin.gpus import gpu_named

PYTHON = os.environ.get("DEEPGEMM_COLDSTART_LIBRARY_PYTHON", "")

pytestmark = [
    pytest.mark.library,
    pytest.mark.skipif(not PYTHON, reason="DEEPGEMM_COLDSTART_LIBRARY_PYTHON is not set"),
]


class Ran:
    """A snippet's JSON output, and the unsupported functions that it called."""

    def __init__(self, snippet: str, work: Path, *, gpu: str = "h200", devices: int = 1) -> None:
        environment = standin_environment(
            gpu_named(gpu),
            python=Path(PYTHON),
            environment=os.environ,
            version_text="release 13.0\n",
            work_dir=work,
            devices=devices,
        )
        program = f"import json, torch\n{snippet}\nprint(json.dumps(found))"
        done = subprocess.run(
            [PYTHON, "-W", "ignore", "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.found: dict[str, Any] = json.loads(done.stdout)
        missed = Path(environment[FAILURES])
        self.missed = missed.read_text().split() if missed.exists() else []


@pytest.mark.parametrize("name", ["h200", "b300", "rtx-pro-6000"])
def test_torch_sees_the_properties_of_the_gpu(tmp_path: Path, name: str) -> None:
    snippet = """
p = torch.cuda.get_device_properties(1)
found = [p.name, p.major, p.minor, p.multi_processor_count, p.total_memory, p.L2_cache_size,
         p.max_threads_per_multi_processor, p.shared_memory_per_block_optin,
         p.shared_memory_per_multiprocessor, torch.cuda.device_count()]
"""
    gpu = gpu_named(name)
    ran = Ran(snippet, tmp_path, gpu=name, devices=2)
    assert ran.found == [
        gpu.device_name,
        gpu.major,
        gpu.minor,
        gpu.num_sms,
        gpu.memory,
        gpu.l2,
        gpu.threads_per_sm,
        gpu.shared_optin,
        gpu.shared_per_sm,
        2,
    ]
    assert ran.missed == []


OPERATIONS = """
x = torch.randn(64, 128, device="cuda")
b, i = x.bfloat16(), torch.zeros(64, dtype=torch.int64, device="cuda")
f8 = torch.float8_e4m3fn
y = {
    "topk": x.topk(4)[0], "sort": x.sort()[0], "softmax": x.softmax(-1), "cumsum": x.cumsum(0),
    "index_put": x.index_put((i,), x.clone()), "scatter": x.scatter_add(0, i[:, None], x.clone()),
    "float32": x @ x.T, "bfloat16": b @ b.T, "half": x.half() @ x.half().T,
    "float64": x.double() @ x.double().T, "batched": torch.bmm(b[None], b.T[None]),
    "linear": torch.nn.functional.linear(b, b), "vector": x @ x[0], "nonzero": i.nonzero(),
    "out_dtype": torch.mm(b, b.T, out_dtype=torch.float32), "embedding": b[i],
    "scaled": torch._scaled_mm(x.to(f8), x.to(f8).T, x[0, :1], x[0, :1], out_dtype=b.dtype),
    "host": torch.ones(9).pin_memory().cuda(non_blocking=True), "norm": torch.rms_norm(x, (128,)),
}
torch.cuda.synchronize()
found = {name: list(value.shape) for name, value in y.items()}
"""


def test_torch_operations_run_without_unsupported_calls(tmp_path: Path) -> None:
    ran = Ran(OPERATIONS, tmp_path)
    assert len(ran.found) == 19
    assert ran.found["float32"] == ran.found["bfloat16"] == [64, 64]
    assert ran.missed == []


def test_torch_runs_out_of_memory_like_on_a_real_gpu(tmp_path: Path) -> None:
    snippet = """
total = torch.cuda.get_device_properties(0).total_memory
free, all_of_it = torch.cuda.mem_get_info()
most = torch.empty(free * 9 // 10, dtype=torch.uint8, device="cuda")
try:
    torch.empty(free // 5, dtype=torch.uint8, device="cuda")
    more = True
except torch.OutOfMemoryError:
    more = False
del most
torch.cuda.empty_cache()
again = torch.empty(free * 9 // 10, dtype=torch.uint8, device="cuda").numel() == free * 9 // 10
found = [total == all_of_it, total - free, more, again]
"""
    ran = Ran(snippet, tmp_path)
    assert ran.found == [True, 552402944, False, True]
    assert ran.missed == []


def test_torch_captures_and_replays_cuda_graphs(tmp_path: Path) -> None:
    snippet = """
x = torch.randn(64, 64, device="cuda")
x @ x
graph = torch.cuda.CUDAGraph()
seen = [torch.cuda.is_current_stream_capturing()]
with torch.cuda.graph(graph):
    seen.append(torch.cuda.is_current_stream_capturing())
    y = (x @ x).softmax(-1)
graph.replay()
torch.cuda.synchronize()
found = [*seen, torch.cuda.is_current_stream_capturing()]
"""
    ran = Ran(snippet, tmp_path)
    assert ran.found == [False, True, False]
    assert ran.missed == []


def test_unsupported_operation_fails_and_is_named(tmp_path: Path) -> None:
    """cuFFT calls the driver directly, which reports the unsupported function by name."""
    snippet = """
try:
    torch.fft.fft(torch.ones(4, device="cuda"))
    found = "ran"
except RuntimeError:
    found = "failed"
"""
    ran = Ran(snippet, tmp_path)
    assert (ran.found, ran.missed) == ("failed", ["cuGetExportTable"])
