"""Compile kernels: one at a time as the library does, or many at once with less work."""
