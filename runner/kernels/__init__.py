"""Which kernels a GEMM needs: types and shapes, kernels, tables of them and their sources.

A :class:`~runner.kernels.table.KernelTable` says for every GEMM and M which kernels the library
runs. Its answers are the library's own, asked on a stand-in GPU (:mod:`runner.kernels.library`) or
recorded earlier (:mod:`runner.kernels.recorded`), or those of our rules for one version of it
(:mod:`runner.kernels.rules_sm90`). Everything else works from tables and knows no versions.
"""
