"""Hand-made kernels and jobs, and the builder's message about an nvcc without stages."""

from runner.build.builder import Job
from runner.kernels.kernel import Kernel
from runner.kernels.keys import CacheKeys

NO_COMMAND = "nvcc has 0 commands where one was expected"


def gemm(*arguments: str, entry: str = "gemm_impl", header: str = "deep_gemm/a.cuh") -> Kernel:
    return Kernel("gemm", header, entry, arguments)


def job_of(kernel: Kernel, keys: CacheKeys | None = None) -> Job:
    if keys is None:
        return Job(kernel.identity, kernel, f"// hash\n{kernel.body}")
    return Job(keys.cache_key(kernel), kernel, keys.source(kernel))
