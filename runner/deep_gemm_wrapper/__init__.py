"""The one place that calls the real DeepGEMM, with SGLang's entry points and execution hook.

Import submodules directly: ``entrypoint`` needs a CUDA torch and the ``deep_gemm`` package.
"""
