"""Build many kernels at once, each exactly once, with less work than one nvcc process a kernel.

Most of a compile is parsing the same headers again. So kernels of one header share a unit: one
preprocessing a header, one front end (cicc) a unit, one assembler (ptxas) a kernel, each with the
command line that nvcc itself would use. The machine code is the plain way's, byte for byte
(docs/building.md says how that was checked); whatever looks unusual goes the plain way.
"""
