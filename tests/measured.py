"""What an H200 compiled for seven GEMM shapes of dsv4 at tp 2, every M in 1..16384."""

import json
from pathlib import Path

from runner.kernels.types import DeepGemmKernelType as T

MEASURED = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "h200_dsv4flash_tp2.jsonl")
    .read_text()
    .splitlines()
]
TYPES = {
    "bf16f32": T.GEMM_NT_BF16BF16F32,
    "hc": T.TF32_HC_PRENORM_GEMM,
    "contig": T.GROUPED_GEMM_NT_F8F8BF16_CONTIG,
    "masked": T.GROUPED_GEMM_NT_F8F8BF16_MASKED,
    "fp8": T.GEMM_NT_F8F8BF16,
}
