"""DeepGEMM's JIT as plain Python: which kernel a call needs, its source, its place in the cache.

Nothing here needs torch, a GPU or a model. The rules are those of the library version named in
``runner.jit.library.SUPPORTED_VERSION``; docs/jit.md says how each was checked.
"""
