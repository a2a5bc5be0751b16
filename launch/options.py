"""A launch's options, and the scenario that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runner.backend.forward_batch import ForwardMode
from runner.config.environ import Environ
from runner.config.fields import OptionDetails, option
from runner.config.timeouts import TORCH_TIMEOUTS_HELP
from runner.config.warmup import WarmupPolicy
from runner.errors import UserError
from runner.model.strategy import STRATEGIES, OverlapStrategy, load_strategy
from runner.options import ReportOptions, ScenarioOptions, to_argv
from runner.scenario import Scenario
from runner.standin.gpus import DEFAULT_GPU, Gpu, gpu_named
from runner.target import LibraryOptions, target_of

REAL_MATH_LIMIT = 2 << 30
"""Model size, in weight elements, above which a CPU skips the math and a GPU shares one buffer
between weights of equal shape. It ignores the layout, so all layouts of a model compute the same.
"""

ROUNDS = 5
"""How many times ``launch.steps`` times ``--repeat`` steps; it reports the median."""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Options that ``launch`` and ``launch.steps`` share."""

    device: str = option(
        "auto", OptionDetails("Where the ranks run.", choices=("auto", "cpu", "cuda"))
    )
    seed: int = option(0, OptionDetails("Seed of the weights."))
    timeout: float = option(1800.0, OptionDetails("Time limit of the run.", unit="SECONDS"))


@dataclass(frozen=True, kw_only=True)
class RunOptions(RankOptions):
    """How this machine runs the scenario. Times are in seconds."""

    virtual_nodes: int = option(
        1,
        OptionDetails(
            "Split the ranks into N nodes, each with its own cache directory.", metavar="N", least=1
        ),
    )
    compute: str | None = option(
        None,
        OptionDetails(
            "Do the math, or only shapes, communication and JIT.  [default: by model size]",
            choices=("real", "skip"),
        ),
    )
    jit: bool = option(True, OptionDetails("Compile kernels."))
    backend: str = option(
        "auto",
        OptionDetails(
            "How ranks on GPUs communicate; auto is NCCL if each rank has its own GPU. With "
            "--virtual-nodes, nccl lets nodes share GPUs.",
            choices=("auto", "nccl", "gloo"),
        ),
    )
    num_sms: int | None = option(
        None,
        OptionDetails("Without a GPU: SMs of the GPU to compile kernels for.  [default: --gpu's]"),
    )
    cache_dir: Path | None = option(
        None,
        OptionDetails("Kernel cache.  [default: DG_JIT_CACHE_DIR, else cold and temporary]"),
    )
    nccl_timeout: float | None = option(
        None,
        OptionDetails(
            f"Longest wait in a communication.  [default: {TORCH_TIMEOUTS_HELP}]",
            unit="SECONDS",
        ),
    )
    probe: bool = option(
        False,
        OptionDetails(
            "Time a reference compile first, so that this run can be compared with others."
        ),
    )
    probed: float | None = option(
        None, OptionDetails("What --probe measured.", unit="SECONDS", hidden=True)
    )
    logits: Path | None = option(
        None, OptionDetails("Write the requests' logits (torch.save, from the last stage).")
    )
    schedule: Path | None = option(
        None, OptionDetails("Write the operations that each rank really ran, as JSON.")
    )


@dataclass(frozen=True, kw_only=True)
class StepOptions(RankOptions):
    """What ``launch.steps`` measures, and where it writes the result."""

    mode: ForwardMode = option(ForwardMode.DECODE, OptionDetails("Forward mode to measure."))
    batch: int = option(
        512,
        OptionDetails("Tokens of the forward; in a decode, one a sequence.", metavar="N", least=2),
    )
    prompt_len: int = option(
        128,
        OptionDetails(
            "Tokens of each sequence, before a decode or in an extend.", metavar="N", least=1
        ),
    )
    overlap: tuple[str, ...] = option(
        (),
        OptionDetails(
            f"What to measure: {', '.join(STRATEGIES)}, or a file.  [default: the mode's]",
            metavar="STRATEGY",
        ),
    )
    repeat: int = option(
        10,
        OptionDetails(f"Steps in a row in each of {ROUNDS} measurements.", metavar="N", least=1),
    )
    cache_dir: Path | None = option(None, OptionDetails("Kernel cache.  [default: a cold one]"))
    json: Path = option(
        Path(), OptionDetails("Write the measurements here.", metavar="FILE", required=True)
    )

    @property
    def strategies(self) -> list[OverlapStrategy]:
        """The given strategies, or all, that are for the mode."""
        given = map(load_strategy, self.overlap) if self.overlap else STRATEGIES.values()
        return [strategy for strategy in given if strategy.mode is self.mode]


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(RunOptions):
    """One launch, as the command line gave it.

    Attributes:
        given: the scenario's options.
        kernels: the library, and the GPU to compile for on a machine without one.
        policies: warm-up policies, run one after the other.
        files: reports to write from the Timelines.
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
            gpu: the GPU to compile for; None is :attr:`target_gpu`.

        Raises:
            UserError: an unknown model, a layout that does not fit the model, or a library that is
                missing or cannot run here.
        """
        gpu = gpu or self.target_gpu
        kernels = self.kernels if self.jit else LibraryOptions()
        target = target_of(kernels, gpu, environ, ignore_installed=not self.jit)
        return self.given.scenario(
            environ,
            policy=policy,
            num_sms=gpu.num_sms,
            source=target.source,
            nodes=max(self.virtual_nodes, environ.hosts),
        )

    @property
    def target_gpu(self) -> Gpu:
        """The GPU to compile for on a machine without one.

        Raises:
            UserError: no such GPU.
        """
        return gpu_named(self.kernels.gpu or DEFAULT_GPU, self.num_sms)

    @property
    def num_ranks(self) -> int:
        """Number of ranks in the layout."""
        pp, tp = self.given.given["pp"], self.given.given["tp"]
        assert isinstance(pp, int) and isinstance(tp, int)
        return pp * tp

    def to_argv(self) -> list[str]:
        """The command line of a launch with these options, without the report files."""
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
        raise UserError("--backend nccl needs --compute real: without math nothing is on a GPU")
    if str(options.files.timeline) == "-":
        raise UserError("--timeline needs a file: a launch prints its progress to standard output")
    for flag, path in (("--logits", options.logits), ("--schedule", options.schedule)):
        if path is not None and len(options.policies) > 1:
            raise UserError(f"{flag} {path} can hold only one run: give one --warmup with it")
