"""Device properties of the stand-in GPU, and calls it does not support, through ctypes."""

import pytest

from runner.standin.gpus import gpu_named
from tests.unit.standin.fake_torch import Child

PROPERTIES = """
text = ctypes.create_string_buffer(2000)
found["code"] = gpu.cudaGetDeviceProperties(text, 0)
found["name"] = text.value.decode()
found["after"] = text.raw[1008:] == bytes(992)
at = lambda offset, kind: struct.unpack_from(kind, text.raw, offset)[0]
found["values"] = {name: at(*where) for name, where in FIELDS.items()}
"""

# Offsets in cudaDeviceProp, from the headers of CUDA 13.
FIELDS = {
    "totalGlobalMem": (288, "Q"),
    "sharedMemPerBlock": (296, "Q"),
    "regsPerBlock": (304, "i"),
    "warpSize": (308, "i"),
    "maxThreadsPerBlock": (320, "i"),
    "totalConstMem": (352, "Q"),
    "major": (360, "i"),
    "minor": (364, "i"),
    "textureAlignment": (368, "Q"),
    "multiProcessorCount": (384, "i"),
    "integrated": (388, "i"),
    "surfaceAlignment": (552, "Q"),
    "pciBusID": (568, "i"),
    "l2CacheSize": (596, "i"),
    "maxThreadsPerMultiProcessor": (604, "i"),
    "sharedMemPerMultiprocessor": (624, "Q"),
    "cooperativeLaunch": (668, "i"),
    "sharedMemPerBlockOptin": (672, "Q"),
    "maxBlocksPerMultiProcessor": (688, "i"),
    "reservedSharedMemPerBlock": (696, "Q"),
    "clusterLaunch": (748, "i"),
    "hostNumaId": (768, "i"),
}


@pytest.mark.parametrize("name", ["h200", "gb300", "rtx-pro-6000"])
def test_device_properties_are_those_of_the_gpu(child: Child, name: str) -> None:
    gpu = gpu_named(name, 100)
    found, said = child.run(f"FIELDS = {FIELDS}\n{PROPERTIES}", child.environment(gpu))
    assert (found["code"], found["name"], found["after"], said) == (0, gpu.device_name, True, [])
    assert found["values"] == {
        "totalGlobalMem": gpu.memory,
        "sharedMemPerBlock": 49152,
        "regsPerBlock": 65536,
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
        "totalConstMem": 65536,
        "major": gpu.major,
        "minor": gpu.minor,
        "textureAlignment": 512,
        "multiProcessorCount": 100,
        "integrated": 0,
        "surfaceAlignment": 512,
        "pciBusID": 1,
        "l2CacheSize": gpu.l2,
        "maxThreadsPerMultiProcessor": gpu.threads_per_sm,
        "sharedMemPerMultiprocessor": gpu.shared_per_sm,
        "cooperativeLaunch": 1,
        "sharedMemPerBlockOptin": gpu.shared_optin,
        "maxBlocksPerMultiProcessor": 24 if gpu.major == 12 else 32,
        "reservedSharedMemPerBlock": 1024,
        "clusterLaunch": 1,
        "hostNumaId": -1,
    }


def test_device_attributes_agree_with_properties(child: Child) -> None:
    snippet = """
value = c_int()
def attribute(number, device=0):
    code = gpu.cuDeviceGetAttribute(byref(value), number, device)
    return value.value if code == 0 else -code
found["values"] = [attribute(number) for number in (75, 76, 16, 81, 97, 38, 39)]
found["bad"] = [attribute(16, 1), attribute(0), attribute(161)]
found["runtime"] = [gpu.cudaDeviceGetAttribute(byref(value), 16, 9), gpu.cudaGetLastError()]
"""
    found, _ = child.run(snippet, child.environment(gpu_named("b300")))
    assert found["values"] == [10, 3, 148, 233472, 232448, 132644864, 2048]
    assert found["bad"] == [-101, -1, -1]
    assert found["runtime"] == [101, 101]


DEVICES = """
count = c_int()
found["count"] = [gpu.cudaGetDeviceCount(byref(count)), count.value]
def each():
    device, seen = c_int(), []
    for index in range(3):
        seen.append([gpu.cudaSetDevice(index), gpu.cudaGetDevice(byref(device)), device.value])
    return seen
found["set"] = each()
def other():
    device = c_int()
    gpu.cudaGetDevice(byref(device))
    found["thread"] = device.value
thread = threading.Thread(target=other); thread.start(); thread.join()
text = ctypes.create_string_buffer(64)
found["bus"] = [gpu.cudaDeviceGetPCIBusId(text, 64, 0), text.value.decode()]
handle = c_void_p()
nvml = ctypes.CDLL("libnvidia-ml.so.1")
total = c_uint()
found["nvml"] = [nvml.nvmlDeviceGetCount_v2(byref(total)), total.value]
"""


def test_current_device_is_per_thread(child: Child) -> None:
    found, _ = child.run(DEVICES, child.environment(devices=2))
    assert found["count"] == [0, 2]
    assert found["set"] == [[0, 0, 0], [0, 0, 1], [101, 0, 1]]
    assert found["thread"] == 0
    assert found["bus"] == [0, "0000:01:00.0"]
    assert found["nvml"] == [0, 2]


@pytest.mark.parametrize(
    ("visible", "count", "bus"),
    [
        ("2", 1, "0000:03:00.0"),
        ("3,1", 2, "0000:04:00.0"),
        ("1,7,0", 1, "0000:02:00.0"),
        ("GPU-5d5d", 1, "0000:01:00.0"),
        ("", 0, ""),
        ("-1", 0, ""),
    ],
)
def test_cuda_visible_devices_is_respected(
    child: Child, visible: str, count: int, bus: str
) -> None:
    found, _ = child.run(DEVICES, child.environment(devices=4, CUDA_VISIBLE_DEVICES=visible))
    assert found["count"] == [0 if count else 100, count]
    assert found["bus"] == ([0, bus] if count else [101, ""])
    assert found["nvml"] == [0, 4]


MISSING = """
calls = (gpu.cudaWarpDrive, gpu.cudaWarpDrive, gpu.cublasWarp, gpu.cuGetExportTable)
found["codes"] = [call() for call in calls]
found["last"] = [gpu.cudaGetLastError(), gpu.cudaGetLastError()]
found["real"] = gpu.cudaMalloc(byref(c_void_p()), c_size_t(1))
entry, result = c_void_p(), c_int(9)
def look_up(name):
    code = gpu.cudaGetDriverEntryPointByVersion(name, byref(entry), 13000, 0, byref(result))
    return [code, result.value, ctypes.CFUNCTYPE(c_int)(entry.value)()]
found["entries"] = [look_up(b"cuCtxSynchronize"), look_up(b"cuProfilerStart"), look_up(b"cuNew")]
found["same"] = gpu.cuGetProcAddress_v2(b"cuMemAlloc", byref(entry), 13000, 0, None)
found["edition"] = entry.value == ctypes.cast(gpu.cuMemAlloc_v2, c_void_p).value
found["missing"] = missing()
found["left"] = ctypes.CDLL("libcublasLt.so.13").cublasLtMatmulDescCreate()
found["length"] = gpu.standin_failed(ctypes.create_string_buffer(16), 16)
"""


def test_unsupported_functions_fail_and_are_named(child: Child) -> None:
    folder = child.packages / "nvidia" / "cu13" / "lib"
    environment = child.environment(LD_LIBRARY_PATH=str(folder))
    found, said = child.run(MISSING, environment)
    assert found["codes"] == [801, 801, 15, 801]
    assert found["last"] == [801, 0]
    assert found["real"] == 0
    assert found["entries"] == [[0, 0, 0], [0, 0, 801], [0, 0, 801]]
    assert found["edition"]
    names = ["cudaWarpDrive", "cublasWarp", "cuGetExportTable", "cuProfilerStart", "cuNew"]
    assert found["missing"] == names
    assert found["length"] == sum(len(name) + 1 for name in names)
    assert said == [f"stand-in GPU: {name} is not stood in" for name in names]
    assert (child.work / "failures.txt").read_text().split() == names
    assert found["left"] == 77  # the real library's, which needs no GPU


def test_cuda_12_function_fails_and_is_named(child: Child) -> None:
    snippet = "found['code'] = gpu.cudaGetDeviceProperties_v2(None, 0)"
    found, said = child.run(snippet, child.environment())
    assert found["code"] == 801
    assert said == ["stand-in GPU: cudaGetDeviceProperties_v2 (CUDA 12) is not stood in"]


def test_missing_settings_give_no_device_and_a_message(child: Child) -> None:
    environment = child.environment()
    bare = {key: value for key, value in environment.items() if "STANDIN" not in key}
    snippet = "found['code'] = gpu.cudaGetDeviceCount(byref(c_int()))"
    found, said = child.run(snippet, bare)
    assert found["code"] == 100
    assert "DEEPGEMM_STANDIN_MAJOR is not set: start the process with runner standin" in said[0]
