"""Requests that flow through the pipeline stage by stage, like a server's first requests.

A request of ``tokens`` tokens is one EXTEND of that many prompt tokens, then one DECODE with one
token per sequence. DECODE waits for the tokens that the last stage sampled, so without a warm-up
the stages compile one after the other, each when the request arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.backend.tensor import Tensor
from runner.driver.warmup import dummy_modes
from runner.model.model_runner import ModelRunner
from runner.scenario import Scenario


@lru_cache(maxsize=64)
def prompt_lens(tokens: int, prompt_len: int) -> tuple[int, ...]:
    """Length of each prompt of a request; the last one may be shorter."""
    full, rest = divmod(tokens, prompt_len)
    return (prompt_len,) * full + ((rest,) if rest else ())


def serve(
    runner: ModelRunner, scenario: Scenario, tokens: int, keep: Callable[[Tensor | None], None]
) -> None:
    """Run one request of ``tokens`` tokens on this rank; every rank of the replica must call it.

    A prefill node stops after EXTEND; a decode node starts at DECODE. With prompts of one token,
    the default, both run ``tokens`` tokens, like a dummy run of that batch size. On the last stage
    ``keep`` gets the logits [sequences, vocab] of each forward; nothing else holds on to them,
    because a large batch's logits are gigabytes.
    """
    lens, modes = prompt_lens(tokens, scenario.prompt_len), dummy_modes(scenario)
    cache = runner.backend.new_cache(len(lens), max(lens) + 1)
    extends = ForwardMode.EXTEND in modes
    logits = None
    if extends:
        ids = runner.dummy_ids(tokens)
        logits = _forward(runner, ForwardBatch.extend(lens, input_ids=ids, cache=cache))
        keep(logits)
    if ForwardMode.DECODE in modes:
        many = len(lens)
        ids = _next_ids(runner, logits, many) if extends else runner.dummy_ids(many)
        batch = ForwardBatch.decode(_one_longer(lens), input_ids=ids, cache=cache)
        keep(_forward(runner, batch))


@lru_cache(maxsize=64)
def _one_longer(lens: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length + 1 for length in lens)


def _forward(runner: ModelRunner, batch: ForwardBatch) -> Tensor | None:
    """Receive from the previous stage, run, and send on; only the last stage returns logits."""
    backend, stage = runner.backend, runner.at.pp_rank
    proxy = runner.proxy(
        batch, lambda name, shape: backend.recv(name, shape, "bf16", _peer(runner, stage - 1))
    )
    result = runner.forward(batch, proxy)
    if not isinstance(result, dict):
        return result
    for name, tensor in result.items():
        backend.send(name, tensor, _peer(runner, stage + 1))
    return None


def _next_ids(runner: ModelRunner, logits: Tensor | None, sequences: int) -> tuple[int, ...] | None:
    """Sampled tokens; the last stage sends them to the first, and each stage sends them on."""
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
    """The rank with the same tensor rank and replica on another stage."""
    at = runner.at
    return runner.parallel.rank_of(pp_rank, at.tp_rank, at.replica)
