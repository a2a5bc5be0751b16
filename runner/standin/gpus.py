"""The GPUs that can be stood in for, by the numbers that a library can ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runner.errors import UserError

DEFAULT_GPU = "h200"
MOST_SMS = 1024
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One model of GPU.

    Attributes:
        name: what ``--gpu`` calls it.
        device_name: what the GPU calls itself.
        shared_optin: most bytes of shared memory that a block can opt in to.
        shared_per_sm: bytes of shared memory of an SM.
        l2: bytes of L2 cache.
        memory: bytes that a process sees in total.
        host: machine that such GPUs are mostly found in, as ``platform.machine()`` has it.
        source: where the numbers come from; shared memory and threads of an SM are those that
            NVIDIA's CCCL lists for the architecture.
    """

    name: str
    device_name: str
    major: int
    minor: int
    sms: int
    shared_optin: int = 232448
    shared_per_sm: int = 233472
    l2: int
    memory: int
    threads_per_sm: int = 2048
    host: str = "x86_64"
    source: str

    @property
    def arch(self) -> str:
        """What DeepGEMM compiles for on it: its own features, or those of its family."""
        if self.major == 9:
            return "sm_90a"
        return f"sm_{self.major}0f"


GPUS = (
    Gpu(
        name="h100",
        device_name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        sms=132,
        l2=52428800,
        memory=85045477376,
        source="deviceQuery output; SMs measured",
    ),
    Gpu(
        name="h200",
        device_name="NVIDIA H200",
        major=9,
        minor=0,
        sms=132,
        l2=62914560,
        memory=150109880320,
        source="measured, driver 580.159",
    ),
    Gpu(
        name="h20",
        device_name="NVIDIA H20",
        major=9,
        minor=0,
        sms=78,
        l2=62914560,
        memory=102010716160,
        source="torch's properties, as a user quotes them",
    ),
    Gpu(
        name="b200",
        device_name="NVIDIA B200",
        major=10,
        minor=0,
        sms=148,
        l2=132644864,
        memory=191514017792,
        source="torch's properties, as users quote them",
    ),
    Gpu(
        name="gb200",
        device_name="NVIDIA GB200",
        major=10,
        minor=0,
        sms=152,
        l2=132644864,
        memory=197901418496,
        host="aarch64",
        source="users' notes, memory by an out-of-memory message; L2 assumed to be B200's",
    ),
    Gpu(
        name="b300",
        device_name="NVIDIA B300 SXM6 AC",
        major=10,
        minor=3,
        sms=148,
        l2=132644864,
        memory=287428771840,
        source="logs that users quote",
    ),
    Gpu(
        name="gb300",
        device_name="NVIDIA GB300",
        major=10,
        minor=3,
        sms=152,
        l2=132644864,
        memory=296889614336,
        host="aarch64",
        source="users' notes, memory by an out-of-memory message; L2 assumed to be B300's",
    ),
    Gpu(
        name="rtx-pro-6000",
        device_name="NVIDIA RTX PRO 6000 Blackwell Server Edition",
        major=12,
        minor=0,
        sms=188,
        shared_optin=101376,
        shared_per_sm=102400,
        l2=134217728,
        memory=101974016000,
        threads_per_sm=1536,
        source="torch's properties, as a user quotes them",
    ),
)
"""All of them; DeepGEMM's keys depend on the architecture and the number of SMs alone."""


def gpu_named(name: str, num_sms: int | None = None) -> Gpu:
    """The GPU of that name, with another number of SMs if one is given.

    Raises:
        UserError: no GPU of that name, or no such number of SMs.
    """
    found = next((gpu for gpu in GPUS if gpu.name == name.lower()), None)
    if found is None:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise UserError(f"GPU {name!r} is not known: use one of {known}")
    if num_sms is None:
        return found
    if not 1 <= num_sms <= MOST_SMS:
        raise UserError(f"num-sms {num_sms} must lie in 1..{MOST_SMS}")
    return replace(found, sms=num_sms)
