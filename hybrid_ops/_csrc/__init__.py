"""Launchers of the CUDA extension's kernels: configs, pointers, strides and streams. One file per op."""

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/common/dtype.h
