"""The stand-in GPU's streams, graph capture, loaded kernels and launch log."""

from pathlib import Path

from tests.unit.standin.fake_torch import Child

CAPTURE = """
first, second, event, graph, runs = (c_void_p() for _ in range(5))
state, nodes = c_int(), c_size_t()
def states():
    seen = []
    for stream in (None, first, second):
        gpu.cudaStreamIsCapturing(stream, byref(state))
        seen.append(state.value)
    return seen
gpu.cudaStreamCreate(byref(first)); gpu.cudaStreamCreate(byref(second))
gpu.cudaEventCreate(byref(event))
found["before"] = states()
found["default"] = gpu.cudaStreamBeginCapture(None, 0)
found["begin"] = [gpu.cudaStreamBeginCapture(first, 0), gpu.cudaStreamBeginCapture(first, 0)]
found["one"] = states()
found["waits"] = [gpu.cudaStreamSynchronize(first), gpu.cudaStreamSynchronize(second)]
gpu.cudaEventRecord(event, first); gpu.cudaStreamWaitEvent(second, event, 0)
found["joined"] = states()
code, at = allocate(64)
gpu.cudaMemsetAsync(at, 0, c_size_t(64), first)
gpu.cudaMemsetAsync(at, 0, c_size_t(64), second)
gpu.cudaMemsetAsync(at, 0, c_size_t(64), None)
number, held = ctypes.c_uint64(), c_void_p()
gpu.cudaStreamGetCaptureInfo(second, byref(state), byref(number), byref(held), None, None, None)
found["info"] = [state.value, number.value > 0, held.value is not None]
found["end"] = [gpu.cudaStreamEndCapture(first, byref(each)) for each in (graph, runs)]
found["after"] = states()
found["same"] = held.value == graph.value
gpu.cudaGraphGetNodes(graph, None, byref(nodes))
found["nodes"] = nodes.value
found["graph"] = [gpu.cudaGraphInstantiate(byref(runs), graph, 0), gpu.cudaGraphLaunch(runs, first),
                  gpu.cudaGraphExecDestroy(runs), gpu.cudaGraphDestroy(graph)]
"""


def test_stream_capture_and_graphs(child: Child) -> None:
    found, said = child.run(CAPTURE, child.environment())
    assert found["before"] == found["after"] == [0, 0, 0]
    assert found["default"] == 900
    assert found["begin"] == [0, 900]
    assert found["one"] == [0, 1, 0]
    assert found["waits"] == [900, 0]
    assert found["joined"] == [0, 1, 1]
    assert found["info"] == [1, True, True]
    assert found["end"] == [0, 1]
    assert found["same"] and found["nodes"] == 2
    assert found["graph"] == [0, 0, 0, 0]
    assert said == []


def test_events_measure_elapsed_time(child: Child) -> None:
    snippet = """
import time
start, end, passed = c_void_p(), c_void_p(), c_float()
gpu.cudaEventCreate(byref(start)); gpu.cudaEventCreate(byref(end))
gpu.cudaEventRecord(start, None); time.sleep(0.02); gpu.cudaEventRecord(end, None)
found["code"] = gpu.cudaEventElapsedTime(byref(passed), start, end)
found["passed"] = passed.value
"""
    found, _ = child.run(snippet, child.environment())
    assert found["code"] == 0 and 19 < found["passed"] < 20_000


LAUNCHES = """
class Config(ctypes.Structure):
    _fields_ = [("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint),
                ("stream", c_void_p), ("attributes", c_void_p), ("count", c_uint)]
config = Config()
def kernel(library):
    out = (c_void_p * 1)()
    assert gpu.cuLibraryEnumerateKernels(out, 1, library) == 0
    return c_void_p(out[0])
def load(path):
    library = c_void_p()
    return gpu.cuLibraryLoadFromFile(byref(library), path, *[None] * 2, 0, *[None] * 2, 0), library
found["bad"] = [load(b"none.cubin")[0], load(b"empty.cubin")[0]]
(code, a), (code, b) = load(b"a.cubin"), load(b"b.cubin")
data = c_void_p()
gpu.cuLibraryLoadData(byref(data), b"", *[None] * 2, 0, *[None] * 2, 0)
ka, kb, kd = kernel(a), kernel(b), kernel(data)
found["nothing"] = drain()
def launch(handle):
    return gpu.cuLaunchKernelEx(byref(config), handle, None, None)
found["codes"] = [launch(each) for each in (ka, kb, kd, ka)]
found["plain"] = gpu.cuLaunchKernel(kb, 1, 1, 1, 1, 1, 1, 0, None, None, None)
found["runtime"] = gpu.cudaLaunchKernelExC(byref(config), c_void_p(1 << 20), None)
found["log"] = drain()
found["again"] = drain()
found["paths"] = [gpu.standin_loaded(i).decode() for i in range(3)]
found["none"] = gpu.standin_loaded(3)
config.shared = 232449
found["too_much"] = [launch(ka), *(gpu.cuFuncSetAttribute(ka, 8, n) for n in (232449, 232448))]
config.shared = 0
for _ in range(5000): launch(ka)
for _ in range(7): launch(kb)
found["parts"] = [len(drain(4000)), drain(1), len(drain(4000)), drain()]
def many():
    for _ in range(3000): launch(ka)
threads = [threading.Thread(target=many) for _ in range(4)]
for each in threads: each.start()
for each in threads: each.join()
found["threads"] = len(drain(20000))
"""


def test_kernel_loads_and_launches_are_logged(child: Child, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.cubin").write_text("cubin")
    (tmp_path / "empty.cubin").touch()
    snippet = f"os.chdir({str(tmp_path)!r})\n{LAUNCHES}"
    found, said = child.run(snippet, child.environment())
    assert found["bad"] == [301, 200]
    assert found["nothing"] == found["again"] == []
    assert found["codes"] == [0, 0, 0, 0]
    assert (found["plain"], found["runtime"]) == (0, 0)
    assert found["paths"] == ["a.cubin", "b.cubin", ""]
    assert found["none"] is None
    assert found["log"] == [0, 1, 0, 1]
    assert found["too_much"] == [1, 1, 0]
    assert found["parts"] == [4000, [0], 1006, []]
    assert found["threads"] == 12000
    assert said == []
