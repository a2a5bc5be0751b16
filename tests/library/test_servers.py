"""Servers' own warm-ups, unmodified files of their wheels, on a cache of ``runner compile``.

DEEPGEMM_COLDSTART_LIBRARY_PYTHON names an interpreter with torch for CUDA 13 and click; for SGLang
torch 2.11 or 2.14, and apache-tvm-ffi. DEEPGEMM_COLDSTART_WHEELS names a folder with wheels of
sglang 0.5.23, vllm 0.33.0 and the sgl-deep-gemm that goes with that torch.
"""

import json
import os
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runner.config.environ import Environ
from runner.errors import UserError
from runner.kernels.nvcc import find_nvcc

PYTHON = os.environ.get("DEEPGEMM_COLDSTART_LIBRARY_PYTHON", "")
WHEELS = os.environ.get("DEEPGEMM_COLDSTART_WHEELS", "")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.library,
    pytest.mark.nvcc,
    pytest.mark.skipif(not PYTHON, reason="DEEPGEMM_COLDSTART_LIBRARY_PYTHON is not set"),
    pytest.mark.skipif(not WHEELS, reason="DEEPGEMM_COLDSTART_WHEELS is not set"),
]

SGL_DEEP_GEMM = {"2.11": "0.1.4.post1", "2.14": "0.2.3.post2"}
"""Versions of torch, and the sgl-deep-gemm that loads with each."""

SGLANG_FILES = ("sglang/srt/environ.py", "sglang/srt/layers/deep_gemm_wrapper/")
VLLM_FILES = (
    "vllm/envs.py",
    "vllm/model_executor/layers/fused_moe/deep_gemm_utils.py",
    "vllm/model_executor/warmup/deep_gemm_warmup.py",
    "vllm/third_party/deep_gemm/",
    "vllm/utils/deep_gemm.py",
    "vllm/utils/math_utils.py",
    "vllm-0.33.0.dist-info/METADATA",
)

SERVERS_VARIABLES = ("DG_", "SGLANG_", "VLLM_")


@dataclass(frozen=True)
class Server:
    """A server's files, and the cache that was built for its library.

    Attributes:
        name: what the helper script calls it.
        site: folder with its files and its library.
        cache_variable: what names its cache.
        cache: the cache.
        memo: where ``runner`` keeps what it made.
    """

    name: str
    site: Path
    cache_variable: str
    cache: Path
    memo: Path

    def compile(self, library: str, *gemms: str, max_m: int) -> str:
        """What ``runner compile`` says of these GEMMs."""
        asked = [word for gemm in gemms for word in ("--gemm", gemm)]
        words = [*asked, "--max-m", str(max_m), "--gpu", "h200"]
        place = ["--library", str(self.site / library), "--cache-dir", str(self.cache)]
        return run("compile", *words, *place, memo=self.memo).stdout

    def warm_up(self, cache: Path, sizes: dict[str, Any], **variables: str) -> dict[str, Any]:
        """What the helper script tells of a warm-up that finds this cache."""
        script = [PYTHON, "tests/library/server_warmup.py", self.name, str(self.site)]
        done = run(
            *("standin", "--gpu", "h200", "--no-compile", "--", *script, json.dumps(sizes)),
            memo=self.memo,
            **{self.cache_variable: str(cache), **variables},
        )
        assert "not stood in" not in done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told


def run(*words: str, memo: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """``runner`` in the library's environment, without what a server's user may have set."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "DG_JIT_NVCC_COMPILER" or not name.startswith(SERVERS_VARIABLES)
    }
    done = subprocess.run(
        [PYTHON, "-m", "runner", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**kept, "XDG_CACHE_HOME": str(memo), **variables},
    )
    assert done.returncode == 0, done.stderr
    return done


def unpack(wheel: str, files: tuple[str, ...], site: Path) -> None:
    """Files of the wheel whose name begins so, and whole folders where a name ends in a slash."""
    found = sorted(Path(WHEELS).glob(f"{wheel}-*.whl"))
    if len(found) != 1:
        pytest.skip(f"DEEPGEMM_COLDSTART_WHEELS holds {len(found)} wheels {wheel}-*.whl, not one")
    with zipfile.ZipFile(found[0]) as archive:
        archive.extractall(site, [name for name in archive.namelist() if name.startswith(files)])


def entries(cache: Path) -> set[str]:
    return {entry.name for entry in (cache / "cache").iterdir()}


LOOK = """
import importlib.metadata, json
found = importlib.metadata.distributions()
print(json.dumps({(package.name or "").lower(): package.version for package in found}))
"""


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    """Versions of what the interpreter has; skips where ``runner compile`` cannot run."""
    try:
        nvcc = find_nvcc(Environ.read(os.environ))
    except UserError as error:
        pytest.skip(str(error))
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    done = subprocess.run([PYTHON, "-c", LOOK], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    for name in ("torch", "click"):
        if name not in found:
            pytest.skip(f"{PYTHON} has no {name}")
    return found


def library_for_sglang(installed: dict[str, str]) -> str:
    """Version of the sgl-deep-gemm that loads in this interpreter; skips where none does."""
    if "apache-tvm-ffi" not in installed:
        pytest.skip(f"{PYTHON} has no apache-tvm-ffi")
    release = ".".join(installed["torch"].split(".")[:2])
    if release not in SGL_DEEP_GEMM:
        pytest.skip(f"no sgl-deep-gemm is known to load with torch {release}")
    return SGL_DEEP_GEMM[release]


@pytest.fixture(scope="module")
def memo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memo")


SGLANG_GEMMS: list[tuple[str, int, int, int]] = [
    ("gemm_nt_f8f8bf16", 256, 512, 1),
    ("grouped_gemm_nt_f8f8bf16_contig", 256, 512, 4),
    ("grouped_gemm_nt_f8f8bf16_masked", 2048, 512, 256),
]

FAST_LIST = [*range(1, 1024), *range(1024, 2048, 2), 2048]
"""Which M SGLang walks with SGLANG_JIT_DEEPGEMM_FAST_WARMUP and chunks of 2048 tokens."""


@pytest.fixture(scope="module")
def sglang(
    installed: dict[str, str], memo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    version = library_for_sglang(installed)
    folder = tmp_path_factory.mktemp("sglang")
    server = Server("sglang", folder / "site", "SGLANG_DG_CACHE_DIR", folder / "cache", memo)
    unpack("sglang-0.5.23", SGLANG_FILES, server.site)
    unpack(f"sgl_deep_gemm-{version}", ("deep_gemm/",), server.site)
    gemms = [f"{kind}:{n}:{k}" + f":{groups}" * (groups > 1) for kind, n, k, groups in SGLANG_GEMMS]
    said = server.compile("deep_gemm", *gemms, max_m=2048)
    assert said.startswith(f"sgl-deep-gemm {version} (")
    assert "11 kernels -> " in said
    assert "11 built, 0 already there" in said
    return server


def test_sglangs_pre_compile_finds_all_built(sglang: Server, tmp_path: Path) -> None:
    """All M of three types, and then the call itself, made through SGLang's entry points."""
    sizes = {"chunked_prefill_size": 2048, "gemms": SGLANG_GEMMS}
    built = entries(sglang.cache)
    told = sglang.warm_up(sglang.cache, sizes, SGLANG_JIT_DEEPGEMM_FAST_WARMUP="1")
    assert len(FAST_LIST) == 1536
    assert told == {
        "compiles": 0,
        "announced": [1536, 16, 1536],
        "calls": {
            "fp8_gemm_nt:256:512:1": [*FAST_LIST, 1],
            "m_grouped_fp8_gemm_nt_contiguous:256:512:4": [*range(128, 2049, 128), 128],
            "fp8_m_grouped_gemm_nt_masked:2048:512:256": [*FAST_LIST, 1],
        },
    }
    assert entries(sglang.cache) == built
    cold = sglang.warm_up(tmp_path, sizes, SGLANG_JIT_DEEPGEMM_FAST_WARMUP="1")
    assert cold == {**told, "compiles": 11}
    assert entries(tmp_path) == built


VLLM_SIZES = {"max_tokens": 1024, "linears": [[256, 512]], "experts": [[4, 256, 256, 1]]}
"""A linear of N and K, and experts: how many, hidden size, intermediate size, experts a token."""


@pytest.fixture(scope="module")
def vllm(installed: dict[str, str], memo: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    folder = tmp_path_factory.mktemp("vllm")
    server = Server("vllm", folder / "site", "DG_JIT_CACHE_DIR", folder / "cache", memo)
    unpack("vllm-0.33.0", VLLM_FILES, server.site)
    library = "vllm/third_party/deep_gemm"
    dense = server.compile(library, "gemm_nt_f8f8bf16:256:512", max_m=1024)
    assert dense.startswith("vllm 0.33.0 (")
    assert "5 built, 0 already there" in dense
    experts = [f"grouped_gemm_nt_f8f8bf16_contig:{n}:256:4" for n in (512, 256)]
    assert "6 built, 0 already there" in server.compile(library, *experts, max_m=1536)
    return server


WALKED_BY_VLLM = {
    "relax": sorted([1, 2, 4, *range(8, 65, 8), *range(128, 1025, 64), 132 * 64 // 16]),
    "full": [*range(1, 1025)],
}
"""M of the linear: small ones, multiples of a tile, a wave of the smallest tiles; or all."""


@pytest.mark.parametrize(("mode", "steps"), [("relax", 49), ("full", 1046)])
def test_vllms_warm_up_finds_all_built(vllm: Server, mode: str, steps: int, tmp_path: Path) -> None:
    """A linear and both GEMMs of experts, as a model's layers offer them."""
    built = entries(vllm.cache)
    told = vllm.warm_up(vllm.cache, VLLM_SIZES, VLLM_DEEP_GEMM_WARMUP=mode)
    experts = [128, 256, *range(512, 1537, 128)]
    assert len(WALKED_BY_VLLM[mode]) + 2 * len(experts) == steps
    assert told == {
        "compiles": 0,
        "announced": [steps],
        "calls": {
            "fp8_gemm_nt:256:512:1": WALKED_BY_VLLM[mode],
            "m_grouped_fp8_gemm_nt_contiguous:512:256:4": experts,
            "m_grouped_fp8_gemm_nt_contiguous:256:256:4": experts,
        },
    }
    assert entries(vllm.cache) == built
    cold = vllm.warm_up(tmp_path, VLLM_SIZES, VLLM_DEEP_GEMM_WARMUP=mode)
    assert cold == {**told, "compiles": 11}
    assert entries(tmp_path) == built
