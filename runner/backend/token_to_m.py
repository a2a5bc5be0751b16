"""From token counts to a GEMM's M: SGLang 0.5.23's rules, shared by driver and planner."""

from __future__ import annotations

from runner.kernels.heuristics_sm90 import CONTIGUOUS_M_ALIGNMENT, ceil_div

MASKED_BUDGET = 6 << 30
"""Most bytes that a masked expert layout may use; above that, the layout is contiguous."""

_MASKED_ROWS_STEP = 256
HC_BLOCK = 64
"""Rows per block, in the rule for the hyper-connection GEMM's number of splits."""


def hc_num_splits(tokens: int, k: int, num_sms: int) -> int:
    """K-splits of the hyper-connection GEMM, as SGLang 0.5.23 chooses them.

    There are enough to fill ``num_sms`` SMs with 64-row blocks, but each split has at least four
    64-wide K-blocks.
    """
    grid = max(1, ceil_div(tokens, HC_BLOCK))
    return max(1, min(num_sms // grid, ceil_div(k, HC_BLOCK) // 4))


def contiguous_rows(choices: int, experts: int) -> int:
    """Rows enough for any routing of ``choices`` to ``experts``, with experts padded to 128 rows.

    SGLang's bound: at most ``min(choices, experts)`` partly filled blocks; all others are full.
    """
    block = CONTIGUOUS_M_ALIGNMENT
    started = min(choices, experts)
    return block * (started + (choices - started) // block)


def masked_rows(tokens: int) -> int:
    """Rows per expert in the masked layout for that many tokens (SGLang's rule)."""
    return (tokens // _MASKED_ROWS_STEP + 1) * _MASKED_ROWS_STEP


def masked_expected_m(choices: int, experts: int) -> int:
    """Expected rows per expert, from which the library chooses the masked GEMM's kernel."""
    return max(1, ceil_div(choices, experts))


def masked_bytes(experts: int, rows: int, hidden: int, intermediate: int) -> int:
    """Peak bytes of the masked expert layout (SGLang's estimate): both GEMMs' buffers."""
    per_row = hidden + hidden // 32 + intermediate + intermediate // 32
    return experts * rows * (per_row + 2 * max(2 * intermediate, hidden))


def masked_token_limit(experts: int, hidden: int, intermediate: int) -> int:
    """Most tokens whose masked layout fits into :data:`MASKED_BUDGET`; 0 if none do."""
    per_step = masked_bytes(experts, _MASKED_ROWS_STEP, hidden, intermediate)
    return max(0, MASKED_BUDGET // per_step * _MASKED_ROWS_STEP - 1)
