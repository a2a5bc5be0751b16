"""A GPU that does nothing: unmodified torch and DeepGEMM run on it, without a GPU."""
