"""``Backend``: what the model's forward is written against.

Each method is one step of the forward. It announces the step's operations, with shapes taken from
the tensors at hand, to a sink, and leaves the work to a ``Math``; communication goes to a
``Communicator``. The same class serves the record backend and the torch backend, so the two
cannot differ in what they call, only in how.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from runner.backend.announcer import bf16_bytes
from runner.backend.attention_steps import AttentionSteps
from runner.backend.communication import Communication
from runner.backend.expert_steps import ExpertSteps
from runner.backend.kernel_steps import KernelSteps
from runner.backend.math import Tokens


class Backend(KernelSteps, AttentionSteps, ExpertSteps, Communication):
    """One rank's interpreter of the forward; see :class:`Announcer` for what it is made of."""

    def embed(self, tokens: Tokens, weight: Any, first_row: int, hidden: int) -> Any:
        """See :meth:`Math.embed`."""
        return self._compute(
            "embed", 4 * tokens.count * hidden, lambda: self.math.embed(tokens, weight, first_row)
        )

    def repeat(self, x: Any, copies: int) -> Any:
        """See :meth:`Math.repeat`."""
        return self._compute("repeat", (1 + copies) * x.nbytes, lambda: self.math.repeat(x, copies))

    def rows(self, x: Any, start: int, stop: int) -> Any:
        """A view of some rows; no operation."""
        return self.math.rows(x, start, stop)

    def padded(self, x: Any, rows: int) -> Any:
        """See :meth:`Math.padded`; no operation."""
        return x if x.shape[0] == rows else self.math.padded(x, rows)

    def joined(self, *parts: Any) -> Any:
        """See :meth:`Math.joined`."""
        traffic = 2 * sum(bf16_bytes(part) for part in parts)
        return self._compute("join", traffic, lambda: self.math.joined(parts))

    def columns(self, x: Any, *sizes: int) -> list[Any]:
        """Cut [T, sum(sizes)] into pieces of the given widths; no operation."""
        edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        return [self.math.columns(x, a, b) for a, b in pairwise(edges)]

    def last_tokens(self, x: Any, tokens: Tokens) -> Any:
        """See :meth:`Math.last_tokens`."""
        return self.math.last_tokens(x, tokens.batch)

    def argmax(self, logits: Any) -> Any:
        """See :meth:`Math.argmax`."""
        return self._compute("argmax", logits.nbytes, lambda: self.math.argmax(logits))

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """See :meth:`Math.rms_norm`."""
        return self._compute("rms_norm", 2 * x.nbytes, lambda: self.math.rms_norm(x, weight, eps))

    def add(self, x: Any, y: Any) -> Any:
        """See :meth:`Math.add`."""
        return self._compute("add", 3 * bf16_bytes(x), lambda: self.math.add(x, y))

    def linear(self, x: Any, weight: Any) -> Any:
        """See :meth:`Math.linear`."""
        m, k = x.shape
        n = weight.shape[0]
        traffic = 2 * (m * k + n * k + m * n)
        return self._compute(
            "linear", traffic, lambda: self.math.linear(x, weight), flops=2 * m * n * k
        )
