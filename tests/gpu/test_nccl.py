"""Real runs over NCCL, a GPU a rank: the same logits as one GPU's, overlap, and time-outs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.deployment import plan_of
from runner.model.strategy import STRATEGIES
from runner.report.segments import busy_segments
from runner.timeline import Timeline, read_timelines
from tests.distributed.launching import run_launch
from tests.gpu.conftest import Take

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    # Together they take some minutes, and kernels of a test are there for the next one.
    pytest.mark.timeout(500),
]

CONFIG = {
    "model_type": "deepseek_v4", "hidden_size": 4096, "num_hidden_layers": 3,
    "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024,
    "o_groups": 8, "o_lora_rank": 1024, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 512, "sliding_window": 128, "compress_ratios": [0, 4, 128],
    "num_hash_layers": 1, "vocab_size": 8192, "n_routed_experts": 16, "num_experts_per_tok": 6,
    "n_shared_experts": 1, "moe_intermediate_size": 2048, "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus", "swiglu_limit": 10.0,
}  # fmt: skip
"""Layers of DeepSeek-V4-Flash with few experts, so that each has weights of its own."""

SIZES = ["--batch-sizes", "2,65", "--prompt-len", "5", "--max-tokens", "512", "--device", "cuda",
         "--warmup", "none"]  # fmt: skip
OVERLAP = ["--overlap", "deepseek-decode", "--overlap", "deepseek-prefill"]
EP = ["--tp", "2", "--ep", "--moe-a2a"]


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def run(
    config: Path, folder: Path, cache: Path, env: dict[str, str], *arguments: str
) -> tuple[Timeline, list[torch.Tensor]]:
    """Timeline and logits of a launch."""
    timeline, logits = folder / "timeline.json", folder / "logits.pt"
    done = run_launch(
        "--model", str(config), *SIZES, *arguments, "--cache-dir", str(cache),
        "--timeline", str(timeline), "--logits", str(logits), env=env, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return read_timelines(timeline)[0], torch.load(logits)


def differences(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of each forward, how far each sequence's logits are apart, against their size."""
    assert len(left) == len(right) == 4
    return [(a - b).norm(dim=1) / b.norm(dim=1) for a, b in zip(left, right, strict=True)]


def test_two_stages_compute_what_one_does(
    config: Path, shared_folder: Path, tmp_path: Path, take_gpus: Take
) -> None:
    """The same kernels on the same numbers: bit for bit."""
    env, cache = take_gpus(2), shared_folder / "kernels"
    _, expected = run(config, tmp_path, cache, env)
    timeline, found = run(config, tmp_path, cache, env, "--pp", "2")
    assert timeline.meta["link"] == "nccl"
    assert all(float(apart.max()) == 0 for apart in differences(found, expected))


@pytest.mark.parametrize("layout", [["--tp", "2"], EP], ids=["tp", "ep"])
def test_two_tensor_ranks_compute_what_one_does(
    layout: list[str], config: Path, shared_folder: Path, tmp_path: Path, take_gpus: Take
) -> None:
    """Sums in another order turn roundings to FP8 around, of 4 bits each, in layer after layer.

    Measured on two H200: 0.05 to 0.19 of a prompt's logits. A decode step after prompts may start
    from another token, so only the prompts are compared.
    """
    env, cache = take_gpus(2), shared_folder / "kernels"
    _, expected = run(config, tmp_path, cache, env)
    timeline, found = run(config, tmp_path, cache, env, *layout)
    assert timeline.meta["link"] == "nccl"
    prompts = differences(found, expected)[::2]
    assert all(float(apart.max()) < 0.4 and float(apart.median()) < 0.12 for apart in prompts)


def test_overlapped_halves_compute_what_the_whole_batch_does(
    config: Path, shared_folder: Path, tmp_path: Path, take_gpus: Take
) -> None:
    """Measured on two H200: the prompts' logits bit for bit, those of a decode within 0.052."""
    env, cache = take_gpus(2), shared_folder / "kernels"
    _, expected = run(config, tmp_path, cache, env, *EP)
    _, found = run(config, tmp_path, cache, env, *EP, *OVERLAP)
    assert all(float(apart.max()) < 0.15 for apart in differences(found, expected))


def test_communication_goes_on_while_the_gpu_computes(
    config: Path, shared_folder: Path, tmp_path: Path, take_gpus: Take
) -> None:
    timeline, _ = run(config, tmp_path, shared_folder / "kernels", take_gpus(2), *EP, *OVERLAP)
    for rank in (0, 1):
        spans = timeline.of_rank(rank)
        beside = [span for span in spans if span.kind == "beside"]
        assert {span.name.split()[1] for span in beside} == {"tokens", "routing", "results"}
        computing = [(s, e) for s, e, kind in busy_segments(spans) if kind == "compute"]
        assert any(s < span.end and span.start < e for span in beside for s, e in computing)


def test_kernels_of_fewer_sms_are_compiled_as_planned(
    config: Path, tmp_path: Path, take_gpus: Take
) -> None:
    """A cold run compiles no kernel that is not planned, and some for 112 SMs."""
    env = take_gpus(2)
    timeline, _ = run(config, tmp_path, tmp_path / "cold", env, *EP, *OVERLAP)
    compiled = {span.key for span in timeline.spans if span.is_kernel}
    from runner.config.hf import load_model
    from runner.config.parallel import ParallelConfig
    from runner.deployment import Deployment

    parallel = ParallelConfig(tp=2, ep=True, moe_a2a=True)
    strategies = tuple(STRATEGIES[name] for name in OVERLAP[1::2])
    deployment = Deployment(
        model=load_model(str(config)), parallel=parallel, max_tokens=512, overlap=strategies
    )
    planned = {item.kernel.identity: item.kernel for item in plan_of(deployment).kernels}
    assert compiled <= set(planned)
    assert any("112" in planned[key].arguments for key in compiled)
    assert timeline.meta["coverage"][0]["present"] == len(compiled)


def test_the_watchdog_names_who_compiles(config: Path, tmp_path: Path, take_gpus: Take) -> None:
    """Rank 0 walks a shape while rank 1 waits for it."""
    done = run_launch(
        "--model", str(config), "--tp", "2", "--warmup", "fast", "--walk-max-m", "512",
        "--batch-sizes", "1", "--device", "cuda", "--cache-dir", str(tmp_path / "cold"),
        "--nccl-timeout", "5", env=take_gpus(2), timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    words = done.stdout + done.stderr
    assert "waited 5 s for rank 0, the limit of --nccl-timeout: rank 0 compiles" in words
