"""Unmodified warm-up code of SGLang and vLLM on a cache built by ``runner compile``.

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
"""From torch versions to the sgl-deep-gemm that loads with each."""

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
    """A server's files, and a cache built for its library.

    Attributes:
        name: its name in the helper script.
        site: folder with the server's files and library.
        cache_variable: environment variable that names the cache.
        cache: the cache.
        memo: cache folder of ``runner`` itself.
    """

    name: str
    site: Path
    cache_variable: str
    cache: Path
    memo: Path

    def compile(self, library: str, *gemms: str, max_m: int) -> str:
        """Output of ``runner compile`` for these GEMMs."""
        asked = [word for gemm in gemms for word in ("--gemm", gemm)]
        words = [*asked, "--max-m", str(max_m), "--gpu", "h200"]
        place = ["--library", str(self.site / library), "--cache-dir", str(self.cache)]
        return run("compile", *words, *place, memo=self.memo).stdout

    def warm_up(self, cache: Path, sizes: dict[str, Any], **variables: str) -> dict[str, Any]:
        """Output of the helper script for a warm-up with this cache."""
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
    """Run ``runner`` in the library's environment, without the user's server variables."""
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
    """Unpack the files of a wheel whose names start with any of ``files``."""
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
    """Versions of the interpreter's packages; skips if ``runner compile`` cannot run."""
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
    """Version of sgl-deep-gemm that loads in this interpreter; skips if none does."""
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
"""M that SGLang walks with SGLANG_JIT_DEEPGEMM_FAST_WARMUP and chunks of 2048 tokens."""


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


def test_sglang_pre_compile_compiles_nothing_on_a_built_cache(
    sglang: Server, tmp_path: Path
) -> None:
    """SGLang's entry points first walk all M of three GEMM types, then make the call itself."""
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
"""linears: (N, K); experts: (number, hidden size, intermediate size, experts per token)."""


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
"""M of the linear: small M, multiples of a tile and a full wave of the smallest tile; or all."""


@pytest.mark.parametrize(("mode", "steps"), [("relax", 49), ("full", 1046)])
def test_vllm_warm_up_compiles_nothing_on_a_built_cache(
    vllm: Server, mode: str, steps: int, tmp_path: Path
) -> None:
    """A linear layer and both GEMMs of experts."""
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
