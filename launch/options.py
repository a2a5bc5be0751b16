"""What a launch was asked to do, and what follows for the scenario."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from runner.backend.gemm_walks import GIB
from runner.build.compiler import find_nvcc, nvcc_version
from runner.config.environ import Environ
from runner.config.hf import load_model, with_layers
from runner.config.parallel import ParallelConfig
from runner.driver.warmup import DisaggregationMode, WarmupOptions, WarmupPolicy
from runner.errors import UserError
from runner.kernels.choose import choose_source
from runner.kernels.installed import find_library
from runner.kernels.source import KernelSource
from runner.model.strategy import load_strategies
from runner.scenario import Scenario
from runner.standin.gpus import DEFAULT_GPU, Gpu, gpu_named

REAL_MATH_LIMIT = 2 << 30
"""Weights of the model, in elements, above which a CPU is not asked for real math, and a GPU run
gives equal shapes one buffer. It does not hang on the layout, so that all layouts of a model
compute the same."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """One launch, as the command line gave it. Sizes in tokens and seconds."""

    model: str = "dsv4"
    layers: int | None = None
    pp: int = 1
    tp: int = 1
    ep: bool = False
    moe_a2a: bool = False
    attn_cp: int = 1
    stage_layers: tuple[int, ...] | None = None
    policies: tuple[WarmupPolicy, ...] = (WarmupPolicy.PP_PARALLEL,)
    batch_sizes: tuple[int, ...] | None = None
    prompt_len: int = 1
    max_tokens: int = 16384
    disaggregation: DisaggregationMode = DisaggregationMode.NONE
    speculative: bool = False
    overlap: tuple[str, ...] = ()
    compute: str | None = None
    jit: bool = True
    device: str = "auto"
    backend: str = "auto"
    gpu: str = DEFAULT_GPU
    num_sms: int | None = None
    library: str | None = None
    virtual_nodes: int = 1
    stream: tuple[int, ...] | None = None
    cuda_graphs: tuple[int, ...] | None = None
    walk_max_m: int | None = None
    walk_memory: float | None = None
    compile_lock: bool = False
    nccl_timeout: float | None = None
    probe: bool = False
    probed: float | None = None
    cache_dir: Path | None = None
    seed: int = 0
    timeout: float = 1800.0
    timeline: Path | None = None
    trace: Path | None = None
    plot: Path | None = None
    logits: Path | None = None
    schedule: Path | None = None

    def scenario(
        self, environ: Environ, *, policy: WarmupPolicy, gpu: Gpu | None = None
    ) -> Scenario:
        """The scenario of one policy.

        Args:
            environ: the environment.
            policy: the policy.
            gpu: the GPU that kernels are for; None is :attr:`meant_gpu`.

        Raises:
            UserError: an unknown model, or a model that the layout does not fit.
        """
        gpu = gpu or self.meant_gpu
        model = load_model(self.model)
        if self.layers is not None:
            model = with_layers(model, self.layers)
        parallel = self.parallel(environ)
        parallel.check_fits(model)
        return Scenario(
            model=model,
            parallel=parallel,
            warmup=WarmupOptions(
                policy=policy,
                batch_sizes=self.batch_sizes,
                disaggregation=self.disaggregation,
                speculative=self.speculative,
                graph_batch_sizes=self.cuda_graphs or (),
                walk_max_m=self.walk_max_m,
                compile_lock=self.compile_lock,
            ),
            num_sms=gpu.sms,
            prompt_len=self.prompt_len,
            bf16_fp32_algo=environ.bf16_fp32_algo,
            max_tokens=self.max_tokens,
            stream=self.stream,
            overlap=load_strategies(self.overlap),
            source=self.source(environ, gpu),
            walk_memory=None if self.walk_memory is None else self.walk_memory * GIB,
        )

    @property
    def meant_gpu(self) -> Gpu:
        """The GPU that kernels are for where there is none.

        Raises:
            UserError: no such GPU.
        """
        return gpu_named(self.gpu, self.num_sms)

    def source(self, environ: Environ, gpu: Gpu) -> KernelSource:
        """What says which kernels GEMMs run.

        Raises:
            UserError: a library that is not there, or that cannot be asked here.
        """
        nvcc = find_nvcc(environ)
        return choose_source(
            gpu,
            find_library(self.library) if self.jit else None,
            wanted=self.library if self.jit else None,
            environ=environ,
            environment=os.environ,
            version_text=None if nvcc is None else nvcc_version(nvcc),
        )

    def parallel(self, environ: Environ) -> ParallelConfig:
        """The layout; nodes are those that torchrun uses, or the virtual ones if they are more.

        Raises:
            UserError: degrees that contradict each other, or no node.
        """
        if self.virtual_nodes < 1:
            raise UserError(f"--virtual-nodes {self.virtual_nodes} must be at least 1")
        world_size = environ.world_size or 1
        real_nodes = world_size // (environ.local_world_size or world_size)
        return ParallelConfig(
            pp=self.pp,
            tp=self.tp,
            ep=self.ep,
            moe_a2a=self.moe_a2a,
            attn_cp=self.attn_cp,
            nodes=max(self.virtual_nodes, real_nodes),
            stage_layers=self.stage_layers,
        )
