"""The stand-in GPU's memory: address space that runs out as a real GPU's memory does."""

from dataclasses import replace

from runner.standin.gpus import gpu_named
from tests.unit.standin.fake_torch import Child

MIB = 1 << 20
CONTEXT = 552402944

RUNNING_OUT = """
free, total = c_size_t(), c_size_t()
def left():
    gpu.cudaMemGetInfo(byref(free), byref(total))
    return total.value - free.value
found["at_first"] = left()
code, first = allocate(1 << 30)
found["first"] = [code, left()]
code, second = allocate(400 << 20)
found["second"] = [code, gpu.cudaGetLastError(), left()]
found["host"] = [allocate(1 << 30, "cudaMallocHost")[0], left()]
found["freed"] = [gpu.cudaFree(first), gpu.cudaFree(None), left()]
found["again"] = [allocate(1400 << 20)[0], gpu.cudaGetLastError(), left()]
found["unknown"] = gpu.cudaFree(c_void_p(4096))
"""


def test_allocation_fails_when_memory_is_exhausted(child: Child) -> None:
    gpu = replace(gpu_named("h200"), memory=2048 * MIB)
    found, _ = child.run(RUNNING_OUT, child.environment(gpu))
    assert found["at_first"] == CONTEXT
    assert found["first"] == [0, CONTEXT + 1024 * MIB]
    assert found["second"] == [0, 0, CONTEXT + 1424 * MIB]
    assert found["host"] == [0, CONTEXT + 1424 * MIB]
    assert found["freed"] == [0, 0, CONTEXT + 400 * MIB]
    assert found["again"] == [2, 2, CONTEXT + 400 * MIB]
    assert found["unknown"] == 1


def test_allocation_sizes_are_rounded_up(child: Child) -> None:
    """As measured on an H200, where small allocations share 2 MiB."""
    snippet = """
free, total = c_size_t(), c_size_t()
def took(size):
    gpu.cudaMemGetInfo(byref(free), byref(total)); before = free.value
    code, at = allocate(size)
    gpu.cudaMemGetInfo(byref(free), byref(total))
    return [before - free.value, at.value % 512]
found["took"] = [took(size) for size in (1, 512, 1 << 20, (1 << 20) + 1, 3 << 20)]
found["nothing"] = [allocate(0)[0], allocate(0)[1].value]
"""
    found, _ = child.run(snippet, child.environment())
    assert found["took"] == [[512, 0], [512, 0], [MIB, 0], [2 * MIB, 0], [4 * MIB, 0]]
    assert found["nothing"] == [0, None]


def test_freed_address_space_is_reused(child: Child) -> None:
    snippet = """
codes, seen = set(), set()
for turn in range(300):  # 30 TB in all
    code, at = allocate(100 << 30)
    codes.add(code); seen.add(at.value)
    codes.add(gpu.cudaFree(at))
kept = [allocate(2 << 20)[1] for _ in range(2000)]
found["codes"] = list(codes)
found["distinct"] = len({at.value for at in kept})
found["apart"] = min(b.value - a.value for a, b in zip(kept, kept[1:]))
for at in kept: gpu.cudaFree(at)
"""
    found, _ = child.run(snippet, child.environment())
    assert found == {"codes": [0], "distinct": 2000, "apart": 2 * MIB}


POINTERS = """
class Attributes(ctypes.Structure):
    _fields_ = [("type", c_int), ("device", c_int), ("on_device", c_void_p), ("on_host", c_void_p),
                ("rest", ctypes.c_long * 8)]
def what(at):
    out = Attributes()
    gpu.cudaPointerGetAttributes(byref(out), at)
    return [out.type, out.device, out.on_device == at.value, out.on_host == at.value]
gpu.cudaSetDevice(1)
code, device = allocate(5 << 20)
code, host = allocate(100, "cudaMallocHost")
inside = c_void_p(device.value + (5 << 20) - 1)
own = ctypes.create_string_buffer(10)
found["kinds"] = [what(at) for at in (device, inside, host, c_void_p(ctypes.addressof(own)))]
start, size, kind = c_void_p(), c_size_t(), c_uint()
gpu.cuMemGetAddressRange_v2(byref(start), byref(size), inside)
found["range"] = [start.value == device.value, size.value]
found["driver"] = [gpu.cuPointerGetAttribute(byref(kind), 2, device), kind.value,
                   gpu.cuPointerGetAttribute(byref(kind), 9, device), kind.value,
                   gpu.cuPointerGetAttribute(byref(kind), 2, own)]
"""


def test_pointer_attributes_of_device_host_and_unknown_memory(child: Child) -> None:
    found, _ = child.run(POINTERS, child.environment(devices=2))
    device, host, unknown = [2, 1, True, False], [1, 1, True, True], [0, -2, False, True]
    assert found["kinds"] == [device, device, host, unknown]
    assert found["range"] == [True, 5 * MIB]
    assert found["driver"] == [0, 2, 0, 1, 1]


def test_memory_copies_and_fills_affect_the_first_mebibyte_only(child: Child) -> None:
    snippet = """
code, at = allocate(4 << 20)
text, back = ctypes.create_string_buffer(b"hello"), ctypes.create_string_buffer(6)
gpu.cudaMemcpy(at, text, c_size_t(6), 1)
gpu.cudaMemcpy(back, at, c_size_t(6), 2)
found["back"] = back.value.decode()
gpu.cudaMemset(at, 65, c_size_t(3))
gpu.cudaMemcpyAsync(back, at, c_size_t(6), 2, None)
found["set"] = back.value.decode()
gpu.cudaMemset(at, 66, c_size_t((1 << 20) + 1))
gpu.cudaMemcpy(back, at, c_size_t(6), 2)
found["large"] = back.value.decode()
gpu.cudaMemcpy2D(back, c_size_t(2), at, c_size_t(4), c_size_t(2), c_size_t(2), 2)
found["pitched"] = back.value.decode()
"""
    found, _ = child.run(snippet, child.environment())
    assert found == {"back": "hello", "set": "AAAlo", "large": "AAAlo", "pitched": "AAo"}


VIRTUAL = """
class Properties(ctypes.Structure):
    _fields_ = [("type", c_int), ("handles", c_int), ("location", c_int), ("device", c_int),
                ("metadata", c_void_p), ("flags", ctypes.c_ubyte * 8)]
free, total = c_size_t(), c_size_t()
def used():
    gpu.cuMemGetInfo_v2(byref(free), byref(total))
    return (total.value - free.value) >> 20
before = used()
at, handle, again, out = c_void_p(), c_void_p(), c_void_p(), Properties()
size = c_size_t(8 << 20)
wanted = Properties(1, 0, 1, 0)
code = gpu.cuMemAddressReserve(byref(at), c_size_t(1 << 40), 0, 0, 0)
found["reserved"] = [code, used() - before]
found["created"] = [gpu.cuMemCreate(byref(handle), size, byref(wanted), 0), used() - before]
found["mapped"] = [gpu.cuMemMap(at, size, 0, handle, 0), gpu.cuMemSetAccess(at, size, None, 1)]
gpu.cuMemRetainAllocationHandle(byref(again), at)
found["same"] = again.value == handle.value
gpu.cuMemGetAllocationPropertiesFromHandle(byref(out), handle)
found["properties"] = [out.type, out.location, out.device]
gpu.cuMemRelease(handle); gpu.cuMemRelease(handle)
found["released"] = used() - before
found["unmapped"] = [gpu.cuMemUnmap(at, size), used() - before, gpu.cuMemAddressFree(at)]
found["too_much"] = gpu.cuMemCreate(byref(handle), c_size_t(1 << 50), byref(wanted), 0)
"""


def test_virtual_memory_management(child: Child) -> None:
    found, _ = child.run(VIRTUAL, child.environment())
    assert found["reserved"] == [0, 0]
    assert found["created"] == [0, 8]
    assert found["mapped"] == [0, 0]
    assert found["same"] and found["properties"] == [1, 1, 0]
    assert found["released"] == 8
    assert found["unmapped"] == [0, 0, 0]
    assert found["too_much"] == 2
