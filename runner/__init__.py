"""Cold-start tooling for servers that JIT-compile DeepGEMM kernels."""

__version__ = "0.1.0"
