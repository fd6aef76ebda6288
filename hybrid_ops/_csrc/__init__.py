"""Launchers of the CUDA extension's kernels: configs, pointers, strides and streams. One file per op."""
