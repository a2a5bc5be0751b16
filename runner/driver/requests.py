"""Requests that flow through the pipeline, stage by stage, as a server's first ones do.

A request of ``tokens`` tokens is one EXTEND of that many prompt tokens and then one DECODE step a
sequence. The DECODE waits for the token that the last stage sampled, so without a warm-up the
stages compile a request's kernels in turn, on arrival.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runner.backend.forward_batch import ForwardBatch, ForwardMode, PPProxyTensors
from runner.backend.tensor import Tensor
from runner.driver.model_runner import ModelRunner
from runner.errors import UserError


@dataclass(frozen=True)
class Request:
    """One request of the driver.

    Attributes:
        tokens: prompt tokens over all sequences.
        prompt_len: prompt length of a sequence; the last one may be shorter. With 1, the default,
            EXTEND and DECODE both see ``tokens`` tokens, as a dummy run of that batch size does.
        modes: forwards to run; a prefill node stops after EXTEND, a decode node starts at DECODE.
    """

    tokens: int
    prompt_len: int = 1
    modes: tuple[ForwardMode, ...] = (ForwardMode.EXTEND, ForwardMode.DECODE)

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.prompt_len < 1:
            raise UserError(
                f"a request needs at least one token and one token per prompt, "
                f"not tokens={self.tokens}, prompt_len={self.prompt_len}"
            )

    @property
    def prompt_lens(self) -> tuple[int, ...]:
        """Prompt length of each sequence."""
        full, rest = divmod(self.tokens, self.prompt_len)
        return (self.prompt_len,) * full + ((rest,) if rest else ())


def serve(runner: ModelRunner, request: Request, keep: Callable[[Tensor | None], None]) -> None:
    """Run one request on this rank; every rank of the replica must call it.

    Args:
        runner: this rank.
        request: what to run.
        keep: on the last stage called with the logits [sequences, vocab] of each forward; nothing
            else holds on to them, since those of a large batch are gigabytes.
    """
    lens = request.prompt_lens
    cache = runner.backend.new_cache(len(lens), max(lens) + 1)
    extends = ForwardMode.EXTEND in request.modes
    logits = None
    if extends:
        ids = runner.dummy_ids(request.tokens)
        logits = _forward(runner, ForwardBatch.extend(lens, input_ids=ids, cache=cache))
        keep(logits)
    if ForwardMode.DECODE in request.modes:
        many = len(lens)
        ids = _next_ids(runner, logits, many) if extends else runner.dummy_ids(many)
        grown = tuple(length + 1 for length in lens)
        keep(_forward(runner, ForwardBatch.decode(grown, input_ids=ids, cache=cache)))


def _forward(runner: ModelRunner, batch: ForwardBatch) -> Tensor | None:
    """Receive from the stage before, run, hand on; the logits on the last stage, else None."""
    proxy = None if runner.stage.is_first else _receive_proxy(runner, batch)
    result = runner.forward(batch, proxy)
    if not isinstance(result, dict):
        return result
    for name, tensor in result.items():
        runner.backend.send(name, tensor, _peer(runner, runner.at.pp_rank + 1))
    return None


def _receive_proxy(runner: ModelRunner, batch: ForwardBatch) -> PPProxyTensors:
    rows = runner.proxy_tokens(batch)
    peer = _peer(runner, runner.at.pp_rank - 1)
    return {
        name: runner.backend.recv(name, (rows, width), "bf16", peer)
        for name, width in runner.proxy_widths.items()
    }


def _next_ids(runner: ModelRunner, logits: Tensor | None, sequences: int) -> tuple[int, ...] | None:
    """Sampled tokens: from the last stage to the first, and on from stage to stage."""
    backend, last = runner.backend, runner.parallel.pp - 1
    at = runner.at
    if logits is not None:
        ids = backend.argmax(logits)
        if last > 0:
            backend.send("next_ids", ids, _peer(runner, 0))
        return runner.backend.read_ids(ids)
    peer = _peer(runner, last if runner.stage.is_first else at.pp_rank - 1)
    ids = backend.recv("next_ids", (sequences,), "int64", peer)
    if at.pp_rank + 1 < last:
        backend.send("next_ids", ids, _peer(runner, at.pp_rank + 1))
    return runner.backend.read_ids(ids)


def _peer(runner: ModelRunner, pp_rank: int) -> int:
    """The same tensor rank of another stage."""
    at = runner.at
    return runner.parallel.rank_of(pp_rank, at.tp_rank, at.replica)
