"""Which kernels a deployment needs, which of them a policy covers, and what is on disk when."""
