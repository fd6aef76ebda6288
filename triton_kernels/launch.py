"""What every launcher needs."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from .._signature import in_python, signature

Plan = TypeVar("Plan")


_HERE = contextlib.nullcontext()


@contextlib.contextmanager
def _device_of(tensor: Tensor) -> Iterator[None]:
    with torch.cuda.device(tensor.device):
        yield


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on torch's current device and stream: make it the tensor's, at no cost where it already is."""
    if not tensor.is_cuda or tensor.get_device() == torch._C._cuda_getDevice():
        return _HERE
    return _device_of(tensor)


def rows(tensor: Tensor) -> Tensor:
    """(..., n) as (rows, n) with unit last stride: a view where strides allow it (a slice of in_proj), else a copy."""
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """For small tensors, whose kernels take no strides."""
    return None if tensor is None else tensor.contiguous()


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


def cdiv(a: int, b: int) -> int:
    """As `triton.cdiv`, which takes 3 us on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """As `triton.next_power_of_2`, which takes 3 us on the host."""
    return 1 << (n - 1).bit_length()


_compiling: Any = None  # Triton's AsyncCompileMode, inside `compile_only`


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """Launches compile their kernels, as many at once as there are cores, and run nothing: results are zeros.

    So it is in the whole process, other threads (autograd has some) included. Zeros, and not whatever memory holds, for
    torch's own kernels do run, and may take a result for an index.
    """
    global _compiling
    from triton.runtime._async_compile import AsyncCompileMode  # not part of Triton's interface: only who compiles asks

    new_empty = torch.Tensor.new_empty
    with ThreadPoolExecutor() as pool, AsyncCompileMode(pool) as _compiling:
        torch.Tensor.new_empty = torch.Tensor.new_zeros  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]
            _compiling = None


class Launch:
    """A kernel with all that the calls of one problem have in common: its grid, scalars, constants and options.

    A kernel's parameters are its tensors (or None), then scalars, then constants, which `options` names beside
    num_warps and num_stages. Triton binds and specialises them anew at each launch, 30 us for 40 of them; here the
    compiled kernel is kept, so a `Launch` may be used again only for tensors of the same `traits`.
    """

    def __init__(self, kernel: Any, grid: int | tuple[int, ...], scalars: tuple[Any, ...], **options: Any) -> None:
        constants = [options.pop(name) for name in kernel.arg_names if name in options]
        grid = (grid,) if isinstance(grid, int) else grid
        self._kernel, self._grid, self._options = kernel, (*grid, 1, 1)[:3], options
        self._scalars = (*scalars, *constants)
        self._compiled: Any = None
        self._device = 0

    def __call__(self, *tensors: Tensor | None) -> None:
        compiled = self._compiled
        if _compiling is not None:
            self._compile(tensors)
        elif compiled is not None:
            # what `compiled[grid](...)` does, which takes 7 us more to ask for the device and for profilers' hooks
            stream = torch._C._cuda_getCurrentRawStream(self._device)
            handles = (stream, compiled.function, compiled.packed_metadata, None, None, None)
            compiled.run(*self._grid, *handles, *tensors, *self._scalars)
        else:
            compiled = self._kernel[self._grid](*tensors, *self._scalars, **self._options)
            if torch.cuda.is_available():  # not in the interpreter, nor where one compiles for a GPU that is not here
                self._compiled, self._device = compiled, torch.cuda.current_device()

    def _compile(self, tensors: tuple[Tensor | None, ...]) -> None:
        from triton.runtime._async_compile import active_mode

        token = active_mode.set(_compiling)  # which autograd's threads have not inherited
        try:
            self._kernel.warmup(*tensors, *self._scalars, grid=self._grid, **self._options)
        finally:
            active_mode.reset(token)


def traits(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What Triton specialises kernels on, beside the values of scalars; and shapes."""
    found = signature(*tensors) or in_python(*tensors)  # the second: of a dtype that DLPack has no name for
    assert found is not None  # kernels are launched for tensors that have addresses
    return found


_PLANS: dict[tuple[Any, ...], Any] = {}


def plan(key: tuple[Any, ...], make: Callable[[], Plan], device: torch.device) -> Plan:
    """What `make` returns, made once for each key on each GPU."""
    if device.type != "cuda":
        return make()
    key = (*key, device)
    try:
        return _PLANS[key]
    except KeyError:
        pass  # `make` is called outside: its errors are not consequences of this one
    if len(_PLANS) >= 4096:
        _PLANS.clear()
    made = _PLANS[key] = make()
    return made


def launch(
    kernel: Any,
    grid: int | tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[Any, ...],
    **options: Any,
) -> None:
    """Launch a kernel, of which tensors[0] is not None; parameters as in `Launch`."""
    key = (kernel.__name__, grid, scalars, *options.values(), traits(*tensors))
    plan(key, lambda: Launch(kernel, grid, scalars, **options), tensors[0].device)(*tensors)  # type: ignore[union-attr]
