"""``Backend``: the steps that the model's forward is written in.

Each method is one step. It states in one place the step's operation, the shape of its result, and
the function that computes it. The same class records a Schedule from shapes and runs torch, so
both make the same calls.

Shapes: T new tokens, H hidden size, M copies of the residual stream (hyper-connections), h local
attention heads, D head dimension, E local experts, k experts per token. Element types are bf16
unless stated otherwise.
"""

from __future__ import annotations

from runner.backend.attention_steps import AttentionSteps
from runner.backend.communication import Communication
from runner.backend.expert_steps import ExpertSteps
from runner.backend.forward_batch import SequenceCache, Tokens
from runner.backend.gemm_steps import GemmSteps
from runner.backend.tensor import Tensor, bf16_bytes, reshaped, spec


class Backend(GemmSteps, AttentionSteps, ExpertSteps, Communication):
    """One rank's interpreter of the forward; see :class:`StepRunner` for its fields."""

    def embed(self, tokens: Tokens, weight: Tensor, first_row: int) -> Tensor:
        """Embeddings from a vocabulary shard that starts at ``first_row``; others are 0: [T, H]."""
        hidden = weight.shape[1]
        return self._compute(
            "embed",
            4 * tokens.count * hidden,
            spec(tokens.count, hidden),
            lambda math: math.embed(tokens, weight, first_row),
        )

    def repeat(self, x: Tensor, copies: int) -> Tensor:
        """[T, H] -> [T, copies * H]."""
        return self._compute(
            "repeat",
            (1 + copies) * x.nbytes,
            reshaped(x, x.shape[0], copies * x.shape[1]),
            lambda math: x.repeat(1, copies),
        )

    def padded(self, x: Tensor, rows: int) -> Tensor:
        """[T, ...] -> [rows, ...]: add rows of zeros, or cut rows off, at the end."""
        if x.shape[0] == rows:
            return x
        shape = reshaped(x, rows, *x.shape[1:])
        return self._without_operation(shape, lambda math: math.padded(x, rows))

    def joined(self, *parts: Tensor) -> Tensor:
        rows = sum(part.shape[0] for part in parts)
        return self._compute(
            "join",
            2 * sum(bf16_bytes(part) for part in parts),
            reshaped(parts[0], rows, *parts[0].shape[1:]),
            lambda math: math.joined(parts),
        )

    # -- input of a dummy forward; a recording has neither cache nor ids ---------------------------

    def zeros(self, tokens: int, width: int) -> Tensor:
        """[tokens, width], like SGLang's dummy proxy tensors."""
        return self._without_operation(spec(tokens, width), lambda math: math.zeros(tokens, width))

    def new_cache(self, sequences: int, max_len: int) -> SequenceCache | None:
        """A key-value cache for that many sequences of at most ``max_len`` tokens."""
        return None if self.math is None else self.math.new_cache(sequences, max_len)

    def dummy_ids(self, tokens: int, vocab_size: int) -> tuple[int, ...] | None:
        """Ids spread over the vocabulary, the same on every rank."""
        if self.math is None:
            return None
        return tuple((17 + 7919 * i) % vocab_size for i in range(tokens))

    def read_ids(self, ids: Tensor) -> tuple[int, ...] | None:
        """Token ids of a tensor [sequences] int64."""
        return None if self.math is None else tuple(ids.tolist())

    # -- plain steps ------------------------------------------------------------------------------

    def last_tokens(self, x: Tensor, tokens: Tokens) -> Tensor:
        """The last new token of each sequence: [T, N] -> [sequences, N]; records no operation."""
        shape = reshaped(x, tokens.batch.batch_size, x.shape[1])
        return self._without_operation(shape, lambda math: math.last_tokens(x, tokens.batch))

    def argmax(self, logits: Tensor) -> Tensor:
        """Greedy sampling: [sequences, vocab] -> [sequences] int64."""
        return self._compute(
            "argmax",
            logits.nbytes,
            spec(logits.shape[0], dtype="int64"),
            lambda math: logits.argmax(-1),
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._compute(
            "rms_norm", 2 * x.nbytes, x, lambda math: math.rms_norm(x, weight, eps)
        )

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._compute("add", 3 * bf16_bytes(x), x, lambda math: x + y)
