"""One rank: its device, what it runs, and how it connects to the others."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launch.limits import WaitLimit
from launch.options import REAL_MATH_LIMIT, LaunchOptions
from runner.config.environ import Environ
from runner.config.model import ModelConfig
from runner.config.timeouts import TORCH_TIMEOUTS
from runner.errors import UserError
from runner.planning.weight_size import model_elements
from runner.report.console import counted
from runner.scenario import Scenario
from runner.standin.gpus import GPUS, Gpu, gpu_named
from runner.timeline import Span

_START_TIME = 21
"""Field of /proc/PID/stat, counted from 0."""


@dataclass(frozen=True)
class Rank:
    """What one rank runs, and where.

    Attributes:
        link: what moves tensors, ``nccl`` or ``gloo``.
        compute: ``real``, or ``skip`` to run on shapes only.
        reason: why ``compute`` is real or skip, for the user.
        phases: name and start of each phase so far; all of them come before the warm-up.
    """

    options: LaunchOptions
    environ: Environ
    scenario: Scenario
    device: torch.device
    link: str
    compute: str
    reason: str
    phases: list[tuple[str, float]]

    @classmethod
    def connect(cls, options: LaunchOptions, environ: Environ) -> Rank:
        """Work out what this rank runs for the one policy, and connect to the other ranks.

        Raises:
            UserError: bad options or environment variables.
        """
        number, world = environ.rank, environ.world_size
        if not 0 <= number < world:
            raise UserError(f"RANK={number} must be below WORLD_SIZE={world}: torchrun sets both")
        device = pick_device(options.device, environ.local_rank)
        gpu = gpu_of(device) if device.type == "cuda" else options.target_gpu
        scenario = options.scenario(environ, gpu=gpu, policy=options.policies[0])
        phases = [("imports", process_start()), ("process group", time.time())]
        parallel = scenario.parallel
        per_node, local = parallel.ranks_per_node, environ.ranks_on_host
        backend = pick_backend(options.backend, device.type, local, per_node)
        if backend == "nccl" and local > torch.cuda.device_count():
            # NCCL refuses two ranks of one host on one GPU; a host ID per node avoids that.
            os.environ["NCCL_HOSTID"] = f"virtual-node-{parallel.node_of(number)}"
        _init_process_group(device, backend, options.timeout)
        compute, reason = compute_mode(options, device.type, scenario.model)
        # Without math the buffers are in host memory, so gloo moves them even if there is NCCL.
        link = backend if compute == "real" else "gloo"
        rank = cls(options, environ, scenario, device, link, compute, reason, phases)
        check_graphs(scenario, on_gpu=rank.on_gpu, backend=backend)
        return rank

    @property
    def number(self) -> int:
        """World rank."""
        return self.environ.rank

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU does this rank's math."""
        return self.device.type == "cuda" and self.compute == "real"

    @property
    def communication_timeout(self) -> float:
        """Longest wait of a communication, in seconds."""
        given = self.options.nccl_timeout
        return TORCH_TIMEOUTS[self.link] if given is None else given

    def wait_limit(self, log_dir: Path) -> WaitLimit:
        """A watcher that ends slow communication; ``log_dir`` records this host's compiles."""
        first = self.number - self.environ.local_rank
        host_ranks = range(first, first + self.environ.ranks_on_host)
        return WaitLimit(self.number, self.communication_timeout, log_dir, host_ranks)

    def setup_spans(self, end: float) -> list[Span]:
        """Spans of the phases before the warm-up; each ends where the next begins."""
        ends = [start for _, start in self.phases[1:]] + [end]
        return [
            Span(self.number, start, end, kind, name)
            for (name, start), end in zip(self.phases, ends, strict=True)
            for kind in ("phase", "setup")
        ]


def process_start() -> float:
    """When Linux started this process, in seconds since the epoch, to about 10 ms."""
    # The second field is the program's name in brackets, which may contain spaces and brackets.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[_START_TIME - 2]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device that ``--device`` (auto, cpu or cuda) means; UserError if it is not there."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a device: capability and number of SMs, which decide what kernels run.

    Raises:
        UserError: DeepGEMM has no kernels for it.
    """
    found = torch.cuda.get_device_properties(device)
    named = {gpu.device_name: gpu for gpu in reversed(GPUS)}
    alike = {(gpu.major, gpu.minor): gpu for gpu in reversed(GPUS)}
    gpu = named.get(found.name) or alike.get((found.major, found.minor))
    if gpu is None:
        raise UserError(
            f"{found.name} has compute capability {found.major}.{found.minor}: DeepGEMM has no "
            "kernels for it; use --device cpu"
        )
    return gpu_named(gpu.name, found.multi_processor_count)


def pick_backend(wanted: str, device: str, local_world_size: int, ranks_per_node: int) -> str:
    """Resolve ``--backend`` to ``nccl`` or ``gloo``.

    ``auto`` is NCCL if each of the ``local_world_size`` ranks on this machine has its own GPU.

    Raises:
        UserError: NCCL cannot connect the ranks of a (virtual) node.
    """
    if wanted == "nccl":
        check_nccl(device, ranks_per_node)
    if wanted != "auto":
        return wanted
    own = device == "cuda" and torch.cuda.device_count() >= local_world_size
    return "nccl" if own else "gloo"


def check_nccl(device: str, ranks_per_node: int) -> None:
    """Raise UserError unless NCCL can connect the ranks of a (virtual) node."""
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if not gpus:
        raise UserError("--backend nccl moves data on GPUs, but the ranks run on CPUs")
    if ranks_per_node > gpus:
        raise UserError(
            f"--backend nccl: {ranks_per_node} ranks of a node would share {counted(gpus, 'GPU')}, "
            "which NCCL refuses: give --virtual-nodes so that a node has at most "
            f"{counted(gpus, 'rank')}"
        )


def _init_process_group(device: torch.device, backend: str, timeout: float) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    # Silences a warning that NCCL runs sends and receives in order: stages need no other order.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    dist.init_process_group(
        "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
        # A little longer than our own deadline, whose message says more.
        timeout=timedelta(seconds=timeout + 30),
        device_id=None if backend == "gloo" else device,
    )


def compute_mode(options: LaunchOptions, device: str, model: ModelConfig) -> tuple[str, str]:
    """``real`` or ``skip``, and why."""
    if options.compute is not None:
        return options.compute, "as given"
    if device == "cuda":
        return "real", "on a GPU"
    total = model_elements(model)
    if total > REAL_MATH_LIMIT:
        return "skip", f"{total / 1e9:.0f} G weights are too many for math on a CPU"
    return "real", "the model is small"


def check_graphs(scenario: Scenario, *, on_gpu: bool, backend: str) -> None:
    """Raise UserError if a CUDA graph would have to contain collectives over gloo."""
    sizes = scenario.graph_batch_sizes
    if sizes and on_gpu and backend == "gloo" and scenario.parallel.tp > 1:
        raise UserError(
            "--cuda-graphs with --tp above 1 needs NCCL: over gloo the collectives of a "
            "forward go through the host, which a graph cannot contain"
        )
