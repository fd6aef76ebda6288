"""What every launcher needs."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def _device_of(tensor: Tensor) -> Iterator[None]:
    with torch.cuda.device(tensor.device):
        yield


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on torch's current device and stream: make it the tensor's, at no cost where it already is."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return _device_of(tensor)


def rows(tensor: Tensor) -> Tensor:
    """(..., n) as (rows, n) with unit last stride: a view where strides allow it (a slice of in_proj), else a copy."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
