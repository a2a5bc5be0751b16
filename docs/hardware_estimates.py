"""Profiles of GPUs that nothing was measured on, from public figures and a measured profile.

``PYTHONPATH=. python docs/hardware_estimates.py`` rewrites the shipped ones from ``h200``. The
figures and how profiles follow from them: docs/hardware_estimates.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sim.costs.profile import Link, Profile, load_profile, write_profile


@dataclass(frozen=True)
class PublicFigures:
    """What data sheets say about a GPU and its usual host.

    Attributes:
        num_sms: SMs.
        fp8_flops: dense peak, operations per second.
        bf16_flops: the same.
        memory: bytes.
        memory_bandwidth: bytes per second.
        nvlink: bytes per second of one GPU, one way.
        cores_per_node: CPU cores of the usual host.
        note: what else to know.
    """

    num_sms: int
    fp8_flops: float
    bf16_flops: float
    memory: float
    memory_bandwidth: float
    nvlink: float
    cores_per_node: int
    note: str = ""


H200 = PublicFigures(132, 1979e12, 989.5e12, 141e9, 4.8e12, 450e9, 112)

FIGURES = {
    "h20": PublicFigures(78, 296e12, 148e12, 96e9, 4.0e12, 450e9, 96, "the host is assumed"),
    "h100": PublicFigures(132, 1979e12, 989.5e12, 80e9, 3.35e12, 450e9, 112),
    "b200": PublicFigures(
        148,
        4500e12,
        2250e12,
        180e9,
        8.0e12,
        900e9,
        112,
        "kernels are SM100's own, what their compiles and calls take is scaled from SM90's",
    ),
}


def estimate(name: str, figures: PublicFigures, measured: Profile) -> Profile:
    """A profile with rates in proportion to the peaks of the H200 and its measured profile.

    What the host decides stays as measured, but for its number of cores.
    """
    gpu, nvlink = measured.gpu, measured.links["nvlink"]
    ratio = figures.memory_bandwidth / H200.memory_bandwidth
    return replace(
        measured,
        name=name,
        num_sms=figures.num_sms,
        cores_per_node=figures.cores_per_node,
        gpu=replace(
            gpu,
            memory=figures.memory,
            memory_bandwidth=_rounded(gpu.memory_bandwidth * ratio),
            fp8_flops=_rounded(gpu.fp8_flops * figures.fp8_flops / H200.fp8_flops),
            bf16_flops=_rounded(gpu.bf16_flops * figures.bf16_flops / H200.bf16_flops),
        ),
        links={**measured.links, "nvlink": _scaled(nvlink, figures.nvlink / H200.nvlink)},
        estimate=True,
        validation=None,
        provenance=[
            f"an estimate: public figures of the {name} times what {measured.name} was measured "
            "to reach of its own (docs/hardware_estimates.md)"
            + (f"; {figures.note}" if figures.note else ""),
            f"everything else is from {measured.name}",
        ],
    )


def _scaled(link: Link, ratio: float) -> Link:
    return replace(link, bandwidth=_rounded(link.bandwidth * ratio))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def main() -> None:
    """Write the shipped estimates next to the measured profile."""
    folder = Path(__file__).parents[1] / "sim" / "costs" / "profiles"
    measured = load_profile("h200")
    for name, figures in FIGURES.items():
        write_profile(folder / f"{name}.json", estimate(name, figures, measured))


if __name__ == "__main__":
    main()
