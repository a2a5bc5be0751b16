"""``torchrun -m launch``: really runs the model's ranks and really compiles their kernels."""
