"""The kernels that a GEMM needs.

A :class:`~runner.kernels.table.KernelTable` gives the kernels that the library runs for a GEMM and
M. It comes from the library itself on a stand-in GPU (:mod:`~runner.kernels.library`), from a file
of its earlier answers (:mod:`~runner.kernels.table_file`), or from our rules for one version of it
(:mod:`~runner.kernels.rules`). :func:`~runner.kernels.source.choose_source` picks the best source;
all other code uses tables and does not depend on the library's version.
"""
