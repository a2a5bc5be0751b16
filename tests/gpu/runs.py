"""Launches of a small model on GPUs, with prebuilt kernels."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.timeline import Timeline, read_timelines
from tests.distributed.launching import run_launch

CONFIG = {
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "sliding_window": 128,
    "compress_ratios": [0, 4, 128, 4, 128, 4, 128, 4],
    "num_hash_layers": 1,
    "vocab_size": 8192,
    "n_routed_experts": 8,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1024,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
}
"""Layers of DeepSeek-V4-Flash with few, narrow experts, so that all weights fit separately."""

MAX_TOKENS = ["--max-tokens", "512"]
REQUESTS = ["--batch-sizes", "2,65", "--prompt-len", "5", *MAX_TOKENS]
"""A prompt and a decode step of one request, then of thirteen."""

HandOut = Callable[[int], AbstractContextManager[list[int]]]


@dataclass
class Gpus:
    """Launches on this machine's GPUs.

    Attributes:
        count: number of GPUs.
        hand_out: context manager that reserves a number of GPUs.
        shared: folder shared by all test workers.
        own: this test's folder.
    """

    count: int
    hand_out: HandOut
    shared: Path
    own: Path
    _runs: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self.config = self.own / "config.json"
        self.config.write_text(json.dumps(CONFIG))
        self.kernels = self.shared / "kernels"
        self.kernels.mkdir(exist_ok=True)

    def launch(
        self, layout: str, *arguments: str, backend: str = "nccl", cache: Path | None = None
    ) -> tuple[Timeline, list[Any]]:
        """Timeline and logits of a launch; without ``cache`` its kernels are prebuilt."""
        self._runs += 1
        timeline, logits = (self.own / f"{self._runs}.{end}" for end in ("json", "pt"))
        if cache is None:
            # One test at a time builds, so each kernel is built once.
            with self._alone("building"):
                self.build(self.kernels, layout, *arguments)
        done = self.start(
            layout,
            *REQUESTS,
            *arguments,
            *(["--warmup", "none"] if cache else PREBUILT),
            "--cache-dir",
            str(cache or self.kernels),
            "--timeline",
            str(timeline),
            "--logits",
            str(logits),
            backend=backend,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        import torch

        return read_timelines(timeline)[0], torch.load(logits)

    def start(
        self, layout: str, *arguments: str, backend: str = "nccl"
    ) -> subprocess.CompletedProcess[str]:
        """A launch on as many GPUs as it can use; over NCCL, virtual nodes may share GPUs."""
        world = _world_size(layout)
        gpus = max(n for n in range(1, self.count + 1) if world % n == 0)
        words = ["--backend", backend]
        if backend == "nccl" and world > gpus:
            words += ["--virtual-nodes", str(world // gpus)]
        with self.hand_out(gpus) as taken:
            return run_launch(
                "--model",
                str(self.config),
                "--device",
                "cuda",
                *layout.split(),
                *words,
                *arguments,
                env={"CUDA_VISIBLE_DEVICES": ",".join(map(str, taken))},
                timeout=400,
            )

    def build(self, cache: Path, layout: str, *arguments: str) -> None:
        """Build all kernels that a launch may need into a cache."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "runner",
                "compile",
                "--model",
                str(self.config),
                *layout.split(),
                *arguments,
                *MAX_TOKENS,
                "--cache-dir",
                str(cache),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def of_one_rank(self, *arguments: str) -> list[Any]:
        """Logits of a single rank, computed once for all tests."""
        import torch

        name = "-".join(["one", *arguments])
        path = self.shared / f"{name}.pt"
        with self._alone(name):
            if not path.exists():
                torch.save(self.launch("--pp 1 --tp 1", *arguments)[1], path)
        logits: list[Any] = torch.load(path)
        return logits

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Excludes other tests from blocks of the same name."""
        with (self.shared / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


PREBUILT = ["--warmup", "prebuilt"]


def _world_size(layout: str) -> int:
    words = layout.split()
    given = dict(zip(words, [*words[1:], ""], strict=True))
    return int(given.get("--pp", 1)) * int(given.get("--tp", 1))


def differences(left: list[Any], right: list[Any]) -> list[Any]:
    """Relative difference of each sequence's logits, for each forward."""
    assert len(left) == len(right) == 4
    return [(a - b).norm(dim=1) / b.norm(dim=1) for a, b in zip(left, right, strict=True)]
