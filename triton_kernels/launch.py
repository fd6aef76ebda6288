"""What every launcher needs."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
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


@functools.cache
def _architecture_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(tensor: Tensor) -> int:
    """Compute capability that a launch on this tensor compiles for, as 90; the interpreter counts as 90."""
    if tensor.is_cuda:
        return _architecture_of(tensor.device.index)
    if triton.knobs.runtime.interpret:
        return 90
    return triton.runtime.driver.active.get_current_target().arch


@functools.cache
def _num_sms_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_sms(tensor: Tensor) -> int:
    """Multiprocessors that a launch on this tensor may fill; the interpreter counts as 2, so that programs loop."""
    return _num_sms_of(tensor.device.index) if tensor.is_cuda else 2


_PLANS: dict[tuple[Any, ...], dict[Any, Any]] = {}


def plan_of(*problem: Any) -> dict[Any, Any]:
    """The compiled kernels of a problem: all its tensors (or None) and every scalar that is not the same for all calls.

    Triton binds and specialises arguments anew at each launch; an SSD call, three launches of 30 to 40 arguments, took
    the host 137 us that way. Whatever it specialises on, dtypes, divisibility of sizes and strides, alignment of
    pointers, is in the key here, so a problem that comes again is launched without that.
    """
    if not problem[0].is_cuda:  # the interpreter, or compilation for a GPU that is not here
        return {}
    key = tuple(
        (t.shape, t.stride(), t.dtype, t.data_ptr() % 16, t.device) if isinstance(t, Tensor) else t for t in problem
    )
    plan = _PLANS.get(key)
    if plan is None:
        if len(_PLANS) >= 4096:
            _PLANS.clear()
        plan = _PLANS[key] = {}
    return plan


def launch(plan: dict[Any, Any], kernel: Any, grid: int, arguments: tuple[Any, ...], **options: Any) -> None:
    """Launch a kernel of a plan; `arguments` are all of the kernel's parameters in order, its constants among them."""
    compiled = plan.get(kernel.__name__)
    if compiled is None:
        plan[kernel.__name__] = kernel[(grid,)](*arguments, **options)
    else:
        compiled[(grid, 1, 1)](*arguments)
