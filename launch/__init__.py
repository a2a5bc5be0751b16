"""``torchrun -m launch``: runs a model's ranks as real processes and really compiles kernels."""
