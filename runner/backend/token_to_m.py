"""How tokens become a GEMM's M: rules of SGLang 0.5.23 that driver, recorder and planner share."""

from __future__ import annotations

from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT, ceil_div

MASKED_BUDGET = 6 << 30
"""Bytes that a masked expert layout may take before the contiguous one is used instead."""

_MASKED_ROWS_STEP = 256
HC_BLOCK = 64
"""Rows that the hyper-connection GEMM's number of splits counts in."""


def hc_num_splits(tokens: int, k: int, num_sms: int) -> int:
    """K-splits of the hyper-connection GEMM, as SGLang 0.5.23 picks them.

    Enough splits to fill ``num_sms`` SMs with 64-row blocks, at least four 64-wide K-blocks each.
    """
    grid = max(1, ceil_div(tokens, HC_BLOCK))
    return max(1, min(num_sms // grid, ceil_div(k, HC_BLOCK) // 4))


def contiguous_rows(choices: int, experts: int) -> int:
    """Rows that hold any routing of ``choices`` to ``experts``, each expert padded to 128 rows.

    SGLang's bound: at most ``min(choices, experts)`` partly filled blocks, the rest whole.
    """
    block = CONTIGUOUS_M_ALIGNMENT
    started = min(choices, experts)
    return block * (started + (choices - started) // block)


def masked_rows(tokens: int) -> int:
    """Rows per expert that the masked layout holds for that many tokens (SGLang's rule)."""
    return (tokens // _MASKED_ROWS_STEP + 1) * _MASKED_ROWS_STEP


def masked_expected_m(choices: int, experts: int) -> int:
    """Rows that an expert is expected to have: what picks the masked GEMM's kernel."""
    return max(1, ceil_div(choices, experts))


def masked_bytes(experts: int, rows: int, hidden: int, intermediate: int) -> int:
    """Peak bytes of the masked expert layout (SGLang's estimate): both GEMMs' buffers."""
    per_row = hidden + hidden // 32 + intermediate + intermediate // 32
    return experts * rows * (per_row + 2 * max(2 * intermediate, hidden))


def masked_token_limit(experts: int, hidden: int, intermediate: int) -> int:
    """Most tokens whose masked layout fits :data:`MASKED_BUDGET`; 0 where none does."""
    per_step = masked_bytes(experts, _MASKED_ROWS_STEP, hidden, intermediate)
    return max(0, MASKED_BUDGET // per_step * _MASKED_ROWS_STEP - 1)
