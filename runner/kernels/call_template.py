"""A recorded call as a template over M, its number of tokens or rows.

A size that follows M is text in a template: ``M``, ``8*M``, ``align(M,4)`` (M rounded up to a
multiple of 4) or ``8*align(M,4)``; every other size is a number. Which sizes follow M is known by
function, from DeepGEMM's signatures (``deep_gemm/__init__.py`` of sgl-deep-gemm 0.2.5, vLLM 0.33).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runner.kernels.heuristics_sm90 import align

_SCALES_DTYPES = ("float32", "int32")
"""Types of scales, whose columns TMA wants at multiples of 16 bytes, which is 4 scales."""
_SIZE = re.compile(r"(?:(\d+)\*)?(?:M|align\(M,(\d+)\))")

_GEMM = {"a": 0, "d": 0, "c": 0}
_GROUPED = {"a": 0, "d": 0, "grouped_layout": 0, "m_indices": 0}
_LOGITS = {"q": 0, "weights": 0, "cu_seq_len_k_start": 0, "cu_seq_len_k_end": 0}
_PAGED = {"q": 0, "weights": 0, "context_lens": 0, "block_table": 0, "indices": 0}
_SCALES = {"sf": -2}

_PARAMETERS: dict[str, tuple[str, dict[str, int]]] = {
    "fp8_gemm_nt": ("a b d c", _GEMM),
    "fp8_fp4_gemm_nt": ("a b d c", _GEMM),
    "fp4_gemm_nt": ("a b d c", _GEMM),
    "bf16_gemm_nt": ("a b d c", _GEMM),
    "m_grouped_fp8_gemm_nt_contiguous": ("a b d grouped_layout", _GROUPED),
    "m_grouped_fp8_fp4_gemm_nt_contiguous": ("a b d grouped_layout", _GROUPED),
    "m_grouped_bf16_gemm_nt_contiguous": ("a b d grouped_layout", _GROUPED),
    "tf32_hc_prenorm_gemm": ("a b d sqr_sum num_splits", {"a": 0, "d": -2, "sqr_sum": -1}),
    "fp8_einsum": ("expr a b d c", _GEMM),
    "fp8_mqa_logits": ("q kv weights cu_seq_len_k_start cu_seq_len_k_end", _LOGITS),
    "fp8_fp4_mqa_logits": ("q kv weights cu_seq_len_k_start cu_seq_len_k_end", _LOGITS),
    "fp8_paged_mqa_logits": ("q kv weights context_lens block_table schedule_meta", _PAGED),
    "fp8_fp4_paged_mqa_logits": ("q kv weights context_lens block_table schedule_meta", _PAGED),
    "get_paged_mqa_logits_metadata": ("context_lens block_kv num_sms indices", _PAGED),
    "get_mn_major_tma_aligned_tensor": ("sf", _SCALES),
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": ("sf", _SCALES),
}
"""By function: names of its first parameters, and the dimension of tensors that has M rows."""

_OF_WEIGHTS = ("transform_sf_into_required_layout",)
"""Functions that lay out scales; those of weights are called once, and have no M."""

_MASKED_M = {
    "m_grouped_fp8_gemm_nt_masked": "expected_m",
    "m_grouped_fp8_fp4_gemm_nt_masked": "expected_m",
    "m_grouped_bf16_gemm_nt_masked": "expected_m",
    "fp8_m_grouped_gemm_nt_masked": "expected_m",  # the name up to sgl-deep-gemm 0.1.x
}
"""Masked GEMMs: M is a number, the expected rows of a group; the tensors do not depend on it."""
_MASKED_PARAMETERS = "a b d masked_m expected_m"

Plain = object
"""JSON data: an argument as :func:`runner.recording.hook.describe.describe` makes it."""


class NotGeneralError(ValueError):
    """A call that cannot be written as a template; the message says why."""


@dataclass(frozen=True)
class Template:
    """A call with M left open: ``args`` and ``kwargs`` are JSON data with sizes as text."""

    function: str
    args: Sequence[Plain]
    kwargs: Mapping[str, Plain]

    def at(self, m: int) -> tuple[list[Plain], dict[str, Plain]]:
        """The arguments with ``m`` in place."""
        args = [_replace(item, m) for item in self.args]
        return args, {name: _replace(item, m) for name, item in self.kwargs.items()}


@dataclass(frozen=True, slots=True, order=True)
class CallShape:
    """A template that can be a key: what :class:`runner.kernels.types.GemmShape` is for GEMMs.

    Attributes:
        text: the template as canonical JSON.
        m_step: step between values of M with which it can be called.
    """

    text: str
    num_sms: int
    m_step: int = 1

    @classmethod
    def of(cls, template: Template, num_sms: int, m_step: int = 1) -> CallShape:
        """The shape of a template; :attr:`template` gives it back."""
        data = {"function": template.function, "args": template.args, "kwargs": template.kwargs}
        return cls(json.dumps(data, sort_keys=True), num_sms, m_step)

    @property
    def template(self) -> Template:
        return Template(**json.loads(self.text))

    def describe(self) -> str:
        """The call as one line."""
        template = self.template
        return in_words(template.function, template.args, template.kwargs)


def generalise(
    function: str, args: Sequence[Plain], kwargs: Mapping[str, Plain]
) -> tuple[Template, int | None]:
    """Write a recorded call as a template and its M, which is None for a call on weights.

    Raises:
        NotGeneralError: an unknown function, or a size that follows M in a way that is not known.
    """
    if function in _MASKED_M:
        return _masked(function, args, kwargs)
    if function in _OF_WEIGHTS and not kwargs.get("is_sfa"):
        return Template(function, args, kwargs), None
    if function not in _PARAMETERS:
        raise NotGeneralError(f"which sizes of {function} follow the tokens is not known")
    names, rows = _PARAMETERS[function]
    found = _Rows(dict(rows))
    if kwargs.get("use_psum_layout"):
        found.dimensions.pop("grouped_layout")  # It has one number for each group instead.
    named = [*zip(names.split(), args, strict=False)]
    more = list(args[len(named) :])
    general = [found.open(name, item) for name, item in named]
    by_name = {name: found.open(name, item) for name, item in kwargs.items()}
    if found.m is None:
        raise NotGeneralError(f"{function} was called without a tensor that has rows")
    template = Template(function, [*general, *more], by_name)
    if template.at(found.m) != (list(args), dict(kwargs)):
        raise NotGeneralError(f"a stride of {function} does not follow from its shape")
    return template, found.m


def _masked(
    function: str, args: Sequence[Plain], kwargs: Mapping[str, Plain]
) -> tuple[Template, int]:
    name = _MASKED_M[function]
    at = _MASKED_PARAMETERS.split().index(name)
    m = kwargs[name] if name in kwargs else args[at] if at < len(args) else None
    if not isinstance(m, int):
        raise NotGeneralError(f"{function} was called without {name}")
    if name in kwargs:
        return Template(function, args, {**kwargs, name: "M"}), m
    return Template(function, [*args[:at], "M", *args[at + 1 :]], kwargs), m


@dataclass
class _Rows:
    """Opens the sizes that follow M; the first tensor with rows says what M is."""

    dimensions: dict[str, int]
    m: int | None = None

    def open(self, name: str, item: Plain) -> Plain:
        if name not in self.dimensions:
            return item
        if isinstance(item, list):
            return [self.open(name, each) for each in item]
        return self._open_tensor(item, self.dimensions[name]) if isinstance(item, dict) else item

    def _open_tensor(self, tensor: Mapping[str, Plain], dimension: int) -> Plain:
        shape = tensor.get("shape")
        if not isinstance(shape, list) or len(shape) < max(dimension + 1, -dimension):
            return tensor
        at = dimension % len(shape)
        rows = shape[at]
        self.m = rows if self.m is None else self.m
        if rows == 0 or rows % max(self.m, 1):
            raise NotGeneralError(f"a tensor has {rows} rows where M is {self.m}")
        factor = rows // self.m
        opened = {**tensor, "shape": [*shape[:at], _times(factor, "M"), *shape[at + 1 :]]}
        stride = tensor.get("stride")
        if isinstance(stride, list):
            opened["stride"] = _open_stride(str(tensor.get("dtype")), shape, stride, at)
        return opened


def _open_stride(dtype: str, shape: list[int], stride: list[int], at: int) -> list[Plain]:
    """Strides of the dimensions that lie outside of the rows follow the rows' number."""
    step = 4 if dtype in _SCALES_DTYPES else 1
    rows, padded = shape[at], align(shape[at], step)
    outer = [
        value for i, value in enumerate(stride) if i != at and shape[i] > 1 and value > stride[at]
    ]
    if rows == 1 and min(outer, default=0) != step:
        return list(stride)  # One row shows nothing, unless its columns are padded.
    opened: list[Plain] = []
    for dimension, value in enumerate(stride):
        if dimension == at or shape[dimension] == 1 or value <= stride[at]:
            opened.append(value)
        elif value % (padded * stride[at]) == 0:
            opened.append(_times(value // padded, f"align(M,{step})" if step > 1 else "M"))
        elif value % (rows * stride[at]) == 0:
            opened.append(_times(value // rows, "M"))
        else:
            opened.append(value)
    return opened


def _times(factor: int, size: str) -> str:
    return size if factor == 1 else f"{factor}*{size}"


def _replace(item: Plain, m: int) -> Plain:
    if isinstance(item, list):
        return [_replace(each, m) for each in item]
    if isinstance(item, dict):
        return {
            key: [size_at(each, m) for each in value] if key in ("shape", "stride") else value
            for key, value in item.items()
        }
    return m if item == "M" else item


def size_at(size: int | str, m: int) -> int:
    """A size of a template at one M."""
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"{size!r} is not a size of a template")
    factor, step = match.groups()
    return int(factor or 1) * align(m, int(step or 1))


def in_words(function: str, args: Sequence[Plain], kwargs: Mapping[str, Plain]) -> str:
    """The call as one line: ``fp8_gemm_nt((float8_e4m3fn[M,4096], ...), recipe=(1, 128, 128))``."""
    words = [_word(item) for item in args]
    words += [f"{name}={_word(item)}" for name, item in kwargs.items()]
    return f"{function}({', '.join(words)})"


def _word(item: Plain) -> str:
    if isinstance(item, list):
        return f"({', '.join(map(_word, item))})"
    if not isinstance(item, dict):
        return str(item)
    if "object" in item:
        return str(item["object"])
    text = f"{item['dtype']}[{','.join(map(str, item['shape']))}]"
    if "stride" in item:
        text += f"/[{','.join(map(str, item['stride']))}]"
    return f"{text}@{item['device']}" if "device" in item else text
