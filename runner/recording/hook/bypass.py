"""What a rehearsal replaces, because a stand-in GPU cannot run it: other JITs, mainly.

Each replacement counts how often it was used, by name, so that the report can show all of them. A
hook that does not fit a release is in the report, too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from .imports import AfterImport
from .recorder import Recorder

_MOST_CLUSTERS = 16
"""Clusters of a kernel that fit on a GPU, as modules are told that ask their kernels."""

_COMPILED_FOR_SGLANG = ("dpsk_v4_compress_plan",)
"""Modules of SGLang's JIT whose host code makes tensors that are needed: compiled for real."""


class _Zero(int):
    """What a replaced function returns: 0, an empty sequence, or an object of the same kind."""

    _of: _Nothing

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(self._of, name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[object]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Nothing:
    """Stands for a compiled module: any function of it does nothing, and is counted."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        self._name, self._recorder = name, recorder

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def nothing(*args: Any, **kwargs: Any) -> Any:
            self._recorder.count("bypass", f"{self._name}.{name}")
            return self._answer(name)

        nothing.__name__ = name
        return nothing

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.__getattr__(name)

    def _answer(self, function: str) -> Any:
        answers: dict[str, Any] = {
            "get_max_active_clusters": _MOST_CLUSTERS,
            "get_tactic_num": 1,
            "trtllm_get_valid_moe_configs": [[-1, -1]],
        }
        if function in answers:
            return answers[function]
        zero = _Zero()
        zero._of = self
        return zero


class _NoSpec:
    """Stands for a FlashInfer module that would be generated, downloaded or built."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name, self._recorder = name, recorder

    def build_and_load(self, *args: object, **kwargs: object) -> _Nothing:
        self._recorder.count("bypass", f"flashinfer {self.name}")
        return _Nothing(f"flashinfer {self.name}", self._recorder)

    def build(self, *args: object, **kwargs: object) -> None:
        pass

    def get_library_paths(self) -> list[str]:
        return []


def _flashinfer_core(recorder: Recorder, module: Any) -> None:
    def build_and_load(spec: Any, *args: object, **kwargs: object) -> _Nothing:
        return _NoSpec(spec.name, recorder).build_and_load()

    module.JitSpec.build_and_load = build_and_load
    module.JitSpec.build = _NoSpec.build
    module.JitSpec.get_library_paths = _NoSpec.get_library_paths


def _flashinfer_generators(recorder: Recorder, module: Any) -> None:
    for name in dir(module):
        if name.startswith("gen_") and callable(getattr(module, name)):
            setattr(module, name, lambda *args, _name=name, **kwargs: _NoSpec(_name, recorder))


def _flashinfer_cubins(recorder: Recorder, module: Any) -> None:
    """Nothing is downloaded."""
    module.get_artifact = lambda *args, **kwargs: b"x"
    module.get_meta_hash = lambda *args, **kwargs: "x"
    for name in (
        "ensure_symlink",
        "verify_symlinked_headers",
        "setup_cubin_loader",
        "verify_cubin",
        "download_file",
    ):
        setattr(module, name, lambda *args, **kwargs: True)


def _sglang_kv_scales(recorder: Recorder, module: Any) -> None:
    def scale_by_one(method: Any, layer: Any) -> None:
        """The original compares scales that it reads back from the device."""
        recorder.count("bypass", "sglang KV cache scales: 1")
        layer.k_scale_float = layer.v_scale_float = 1.0

    module.BaseKVCacheMethod.process_weights_after_loading = scale_by_one


def _sglang_jit(recorder: Recorder, module: Any) -> None:
    compile_module = module.load_jit

    def load_jit(*names: Any, **kwargs: Any) -> Any:
        if str(names[0]) in _COMPILED_FOR_SGLANG:
            return compile_module(*names, **kwargs)
        name = "sglang jit " + "_".join(map(str, names))
        recorder.count("bypass", name)
        return _Nothing(name, recorder)

    module.load_jit = load_jit


def _vllm_runner(recorder: Recorder, module: Any) -> None:
    sample = module.GPUModelRunner.sample

    def sample_one(runner: Any, hidden: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample one token a request once its prompt is done; a kernel would count them."""
        found = sample(runner, hidden, batch, *args, **kwargs)
        counts = found[0].num_sampled
        done = batch.num_computed_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np
        counts.copy_(counts.new_tensor(done.astype("int32"), device="cpu"))
        recorder.count("bypass", "vllm sampled tokens: one a request")
        return found

    module.GPUModelRunner.sample = sample_one


def _cuda_bindings(recorder: Recorder, module: Any) -> None:
    """They carry a CUDA runtime of their own; SGLang asks it this one question."""
    native = ctypes.CDLL(None)

    def capture_info(stream: Any) -> tuple[object, ...]:
        status = ctypes.c_int()
        native.cudaStreamIsCapturing(ctypes.c_void_p(int(stream)), ctypes.byref(status))
        kind = module.cudaStreamCaptureStatus(status.value)
        return module.cudaError_t.cudaSuccess, kind, 0, None

    module.cudaStreamGetCaptureInfo = capture_info


_HOOKS: dict[str, Callable[[Recorder, Any], None]] = {
    "cuda.bindings.runtime": _cuda_bindings,
    "flashinfer.jit.core": _flashinfer_core,
    "flashinfer.jit.cubin_loader": _flashinfer_cubins,
    "flashinfer.jit.fused_moe": _flashinfer_generators,
    "sglang.kernels.jit.utils.compile.loader": _sglang_jit,
    "sglang.srt.layers.quantization.kv_cache": _sglang_kv_scales,
    "vllm.v1.worker.gpu.model_runner": _vllm_runner,
}


def bypasses(recorder: Recorder) -> dict[str, AfterImport]:
    """What to do after the import of each module that has something to replace."""

    def hook(name: str) -> AfterImport:
        def replace(module: Any) -> None:
            try:
                _HOOKS[name](recorder, module)
            except Exception as error:
                recorder.count("not hooked", f"{name}: {error!r}")

        return replace

    return {name: hook(name) for name in _HOOKS}
