"""Which kernels a GEMM needs.

A :class:`~runner.kernels.table.KernelTable` says for every GEMM and M which kernels the library
runs: as the library itself answers on a stand-in GPU (:mod:`~runner.kernels.library`), as it once
answered (:mod:`~runner.kernels.table_file`), or by our rules for one version of it
(:mod:`~runner.kernels.rules`). :func:`~runner.kernels.source.choose_source` takes the best of them;
everything else works from tables and knows no versions.
"""
