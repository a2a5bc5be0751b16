"""The GPUs that the stand-in can imitate, with the properties that a library can query."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runner.errors import UserError

DEFAULT_GPU = "h200"
MOST_SMS = 1024
_MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One model of GPU; sizes in bytes.

    Attributes:
        name: name in ``--gpu``.
        device_name: name that the driver reports.
        memory: total memory that a process sees.
        shared_optin: most shared memory that a block can opt in to.
    """

    name: str
    device_name: str
    major: int
    minor: int
    num_sms: int
    l2: int
    memory: int
    shared_optin: int = 232448
    shared_per_sm: int = 233472
    threads_per_sm: int = 2048

    @property
    def arch(self) -> str:
        """The architecture that DeepGEMM compiles for on this GPU (a: exact, f: family)."""
        return "sm_90a" if self.major == 9 else f"sm_{self.major}0f"


# Shared memory and threads per SM are from NVIDIA's CCCL, which lists them per architecture.
GPUS = (
    # Name, device name, compute capability, SMs, L2, memory; the comments name the sources.
    # deviceQuery output; SMs measured.
    Gpu("h100", "NVIDIA H100 80GB HBM3", 9, 0, 132, 50 * _MIB, 85045477376),
    # Measured, driver 580.159.
    Gpu("h200", "NVIDIA H200", 9, 0, 132, 60 * _MIB, 150109880320),
    # torch's device properties, as quoted by users.
    Gpu("h20", "NVIDIA H20", 9, 0, 78, 60 * _MIB, 102010716160),
    Gpu("b200", "NVIDIA B200", 10, 0, 148, 132644864, 191514017792),
    # Users' notes; memory from an out-of-memory message; L2 assumed to equal B200's.
    Gpu("gb200", "NVIDIA GB200", 10, 0, 152, 132644864, 197901418496),
    # Logs quoted by users.
    Gpu("b300", "NVIDIA B300 SXM6 AC", 10, 3, 148, 132644864, 287428771840),
    # Users' notes; memory from an out-of-memory message; L2 assumed to equal B300's.
    Gpu("gb300", "NVIDIA GB300", 10, 3, 152, 132644864, 296889614336),
    # torch's device properties, as quoted by a user.
    Gpu(
        "rtx-pro-6000",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        major=12,
        minor=0,
        num_sms=188,
        l2=128 * _MIB,
        memory=101974016000,
        shared_optin=101376,
        shared_per_sm=102400,
        threads_per_sm=1536,
    ),
)
"""DeepGEMM's keys depend only on the architecture and the number of SMs."""


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
    return replace(found, num_sms=num_sms)
