"""Which kernels a deployment needs, which a policy covers, and what is on disk when."""
