"""What a launch was asked to do, and what follows for the scenario."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runner.config.environ import Environ
from runner.config.fields import OptionDetails, option
from runner.config.timeouts import TORCH_TIMEOUTS_HELP
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError
from runner.options import ReportOptions, ScenarioOptions, to_argv
from runner.scenario import Scenario
from runner.standin.gpus import DEFAULT_GPU, Gpu, gpu_named
from runner.target import LibraryOptions, target_of

REAL_MATH_LIMIT = 2 << 30
"""Weights of the model, in elements, above which a CPU is not asked for real math, and a GPU run
gives equal shapes one buffer. It does not depend on the layout, so that all layouts of a model
compute the same."""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """What runs of every kind can be told."""

    device: str = option(
        "auto", OptionDetails("Where the ranks run.", choices=("auto", "cpu", "cuda"))
    )
    seed: int = option(0, OptionDetails("Seed of the weights."))
    timeout: float = option(1800.0, OptionDetails("Longest run.", unit="SECONDS"))


@dataclass(frozen=True, kw_only=True)
class RunOptions(RankOptions):
    """How the scenario is run here. Times in seconds."""

    virtual_nodes: int = option(
        1,
        OptionDetails(
            "Give each of N groups of ranks a cache directory of its own.", metavar="N", least=1
        ),
    )
    compute: str | None = option(
        None,
        OptionDetails(
            "Do the math, or only shapes, communication and JIT.  [default: by size]",
            choices=("real", "skip"),
        ),
    )
    jit: bool = option(True, OptionDetails("Compile kernels."))
    backend: str = option(
        "auto",
        OptionDetails(
            "What ranks on GPUs meet over; auto is NCCL where each has its own. With "
            "--virtual-nodes, nccl lets nodes share GPUs.",
            choices=("auto", "nccl", "gloo"),
        ),
    )
    num_sms: int | None = option(
        None,
        OptionDetails(
            "Without a GPU: SMs of the GPU that kernels are compiled for.  [default: --gpu's]"
        ),
    )
    cache_dir: Path | None = option(
        None,
        OptionDetails("Kernel cache.  [default: DG_JIT_CACHE_DIR, else cold and temporary]"),
    )
    nccl_timeout: float | None = option(
        None,
        OptionDetails(
            f"Longest wait of a communication.  [default: {TORCH_TIMEOUTS_HELP}]",
            unit="SECONDS",
        ),
    )
    probe: bool = option(
        False,
        OptionDetails(
            "First time a reference compile here, so that runs at other times can be compared."
        ),
    )
    probed: float | None = option(
        None, OptionDetails("What --probe measured.", unit="SECONDS", hidden=True)
    )
    logits: Path | None = option(
        None, OptionDetails("Write the requests' logits (torch.save, from the last stage).")
    )
    schedule: Path | None = option(
        None, OptionDetails("Write the operations that really ran, as JSON.")
    )


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(RunOptions):
    """One launch, as the command line gave it.

    Attributes:
        given: the scenario's options.
        kernels: the library, and the GPU that kernels are for where there is none.
        policies: run one after the other.
        files: what is written of the Timelines.
    """

    given: ScenarioOptions
    kernels: LibraryOptions
    policies: tuple[WarmupPolicy, ...]
    files: ReportOptions = ReportOptions()

    def scenario(
        self, environ: Environ, *, policy: WarmupPolicy, gpu: Gpu | None = None
    ) -> Scenario:
        """The scenario of one policy.

        Args:
            environ: the environment.
            policy: the policy.
            gpu: the GPU that kernels are for; None is :attr:`meant_gpu`.

        Raises:
            UserError: an unknown model, a model that the layout does not fit, or a library that is
                not there or cannot be asked here.
        """
        gpu = gpu or self.meant_gpu
        kernels = self.kernels if self.jit else LibraryOptions()
        target = target_of(kernels, gpu, environ, ignore_installed=not self.jit)
        return self.given.scenario(
            environ,
            policy=policy,
            num_sms=gpu.num_sms,
            source=target.source,
            nodes=max(self.virtual_nodes, environ.nodes),
        )

    @property
    def meant_gpu(self) -> Gpu:
        """The GPU that kernels are for where there is none.

        Raises:
            UserError: no such GPU.
        """
        return gpu_named(self.kernels.gpu or DEFAULT_GPU, self.num_sms)

    @property
    def num_ranks(self) -> int:
        """Ranks of the layout."""
        pp, tp = self.given.given["pp"], self.given.given["tp"]
        assert isinstance(pp, int) and isinstance(tp, int)
        return pp * tp

    def to_argv(self) -> list[str]:
        """The command line of a launch with these options, but for the files it writes."""
        policies = [word for policy in self.policies for word in ("--warmup", policy.value)]
        return [*self.given.to_argv(), *to_argv(self.kernels), *policies, *to_argv(self)]


def check_options(options: LaunchOptions) -> None:
    """Raise UserError where options contradict each other."""
    if options.num_sms is not None and (options.num_sms < 2 or options.num_sms % 2):
        raise UserError(f"--num-sms {options.num_sms} must be a positive even number")
    if options.nccl_timeout is not None and options.nccl_timeout < 1:
        raise UserError(
            f"--nccl-timeout {options.nccl_timeout:g} must be at least 1: ranks need some time to "
            "connect"
        )
    if options.backend == "nccl" and options.compute == "skip":
        raise UserError("--backend nccl with --compute skip: without math nothing is on a GPU")
    if str(options.files.timeline) == "-":
        raise UserError("--timeline needs a file: a launch prints its progress")
    for flag, path in (("--logits", options.logits), ("--schedule", options.schedule)):
        if path is not None and len(options.policies) > 1:
            raise UserError(f"{flag} {path} holds one run: give one --warmup with it")
