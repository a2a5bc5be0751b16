"""Lists of M that servers walk in their warm-ups.

Sources: SGLang 0.5.23 ``deep_gemm_wrapper/compile_utils.py`` (full, fast); vLLM
``model_executor/warmup/deep_gemm_warmup.py`` (relax).
"""

from __future__ import annotations

from collections.abc import Sequence

_DEFAULT_MAX = 16384
_UNLIMITED_MAX = 65536
_HARD_MAX = 131072
_FAST_DENSE_UP_TO = 1024
_FAST_MAX = 32768
_RELAX_BLOCK_MS = (64, 128, 256)
_RELAX_WAVES = 10


def full_m_max(chunked_prefill_size: int) -> int:
    """Last M of SGLang's full list; a size below 1 means that prefill is not chunked."""
    if chunked_prefill_size < 1:
        return _UNLIMITED_MAX
    if chunked_prefill_size > _DEFAULT_MAX // 2:
        return min(2 * chunked_prefill_size, _HARD_MAX)
    return _DEFAULT_MAX


def full_m_list(chunked_prefill_size: int) -> range:
    """Every M up to :func:`full_m_max`."""
    return range(1, full_m_max(chunked_prefill_size) + 1)


def fast_m_list(chunked_prefill_size: int) -> tuple[int, ...]:
    """Every M up to 1024, then steps that double each octave, and the largest prefill.

    As upstream, an octave that the largest prefill falls into is sampled to its end.
    """
    limited = chunked_prefill_size >= 1
    largest = min(chunked_prefill_size, _FAST_MAX) if limited else _DEFAULT_MAX
    found = {*range(1, _FAST_DENSE_UP_TO + 1), largest}
    start, step = _FAST_DENSE_UP_TO, 2
    while start < largest:
        found.update(range(start, 2 * start, step))
        start, step = 2 * start, 2 * step
    return tuple(sorted(found))


def relax_m_list(max_tokens: int, n: int, num_sms: int) -> tuple[int, ...]:
    """vLLM's list for a dense GEMM of width ``n``: small M, block multiples, wave boundaries."""
    found = {1, 2, 4, *range(8, 65, 8)}
    for block_m in _RELAX_BLOCK_MS:
        found.update(range(block_m, max_tokens + 1, block_m))
        for block_n in range(16, min(256, n) + 1, 16):
            columns = -(-n // block_n)
            waves = range(1, _RELAX_WAVES + 1)
            found.update(wave * num_sms * block_m // columns for wave in waves)
    return tuple(sorted(m for m in found if 1 <= m <= max_tokens))


def multiples_of(values: Sequence[int], alignment: int) -> tuple[int, ...]:
    """Only the multiples of ``alignment``: what contiguous grouped GEMMs can be walked with."""
    return tuple(m for m in values if m % alignment == 0)


MSteps = tuple[tuple[int, int, int], ...]
"""Ascending M as (first, last, step) runs."""


def steps_of(values: Sequence[int]) -> MSteps:
    """Ascending values as few runs of equal steps."""
    if isinstance(values, range):
        return ((values[0], values[-1], values.step),) if values else ()
    runs: list[tuple[int, int, int]] = []
    for value in values:
        if runs:
            first, last, step = runs[-1]
            if first == last or value - last == step:
                runs[-1] = (first, value, value - last)
                continue
        runs.append((value, value, 1))
    return tuple(runs)


def expand(steps: MSteps) -> list[int]:
    """The values of :func:`steps_of`."""
    return [m for first, last, step in steps for m in range(first, last + 1, step)]
