"""The table of stand-in GPUs."""

import pytest

from runner.errors import UserError
from runner.standin.gpus import GPUS, MOST_SMS, Gpu, gpu_named

NAMES = ["h100", "h200", "h20", "b200", "gb200", "b300", "gb300", "rtx-pro-6000"]


def test_gpu_table_has_known_sms_architectures_and_memory() -> None:
    assert [gpu_named(name) for name in NAMES] == list(GPUS)
    assert gpu_named("B200") is gpu_named("b200")
    assert [gpu.num_sms for gpu in GPUS] == [132, 132, 78, 148, 152, 148, 152, 188]
    arches = ["sm_90a"] * 3 + ["sm_100f"] * 4 + ["sm_120f"]
    assert [gpu.arch for gpu in GPUS] == arches
    h200 = gpu_named("h200")
    assert (h200.memory, h200.l2) == (150109880320, 62914560)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_gpu_limits_are_consistent_with_the_architecture(gpu: Gpu) -> None:
    assert gpu.device_name.startswith("NVIDIA ") and len(gpu.device_name) < 256
    assert gpu.shared_per_sm - gpu.shared_optin == 1024
    assert gpu.shared_optin == (101376 if gpu.major == 12 else 232448)
    assert gpu.threads_per_sm == (1536 if gpu.major == 12 else 2048)
    assert 50 << 20 <= gpu.l2 < 1 << 28
    assert 79 << 30 <= gpu.memory < 300 * 10**9


def test_gpu_named_accepts_a_different_sm_count() -> None:
    assert gpu_named("h200", 120).num_sms == 120
    assert gpu_named("h200", 120).memory == gpu_named("h200").memory
    for number in (0, -1, MOST_SMS + 1):
        with pytest.raises(UserError, match=f"num-sms {number} must lie in 1..1024"):
            gpu_named("h200", number)


def test_unknown_gpu_name_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        gpu_named("h300")
    assert str(caught.value) == f"GPU 'h300' is not known: use one of {', '.join(NAMES)}"
