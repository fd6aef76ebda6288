"""Triton kernels and their launchers, a file per operator family. Import them as `hybrid_ops.triton_kernels`."""
