"""Checks of arguments. Each raises before anything is written and says: argument, expected, got.

Shape, dtype and device are read on the host and cost no synchronisation. Index values are read only where that is free
(CPU tensors) or asked for (`HYBRID_OPS_CHECK=1`, eager, not while a CUDA graph is captured).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from . import _env
from ._signature import signature

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_ORDINARY = (torch.Tensor, torch.nn.Parameter)

P = ParamSpec("P")
Found = TypeVar("Found")


def remembered(check: Callable[P, Found]) -> Callable[P, Found]:
    """`check`, done once for each signature of its arguments (positional, x first) on a GPU."""
    passed: dict[tuple[object, ...], Found] = {}

    @functools.wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> Found:
        if kwargs or not eager_on_gpu(args[0]) or _env.check_values():
            return check(*args, **kwargs)
        key = signature(*args)
        try:
            return passed[key]  # type: ignore[index]
        except KeyError:
            pass
        except TypeError:  # a list, or a symbolic size
            key = None
        found = check(*args, **kwargs)
        if key is not None:
            if len(passed) >= 4096:
                passed.clear()
            passed[key] = found
        return found

    return run


def eager_on_gpu(x: object) -> bool:
    """Whether x is an ordinary tensor on a GPU, in a call that nothing traces or transforms: it has an address."""
    if torch.compiler.is_compiling() or type(x) not in _ORDINARY or torch._C._functorch.peek_interpreter_stack():
        return False
    return x.is_cuda  # type: ignore[attr-defined, no-any-return]


def tensor(
    name: str,
    value: Tensor,
    shape: Sequence[int | None],
    *,
    dtype: torch.dtype | Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """`shape` has a number per dimension, None where any size is right."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    found = value.shape
    if found != shape and not _fits(found, shape):  # the comparison of tuples saves most calls the loop
        raise ValueError(f"{name} must have shape {_shape(shape)}, got {tuple(found)}")
    got = value.dtype
    if got is not dtype and (isinstance(dtype, torch.dtype) or got not in dtype):
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {expected}, got {str(got).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    if got is torch.float64 and value.device.type != "cpu":
        raise TypeError(f"{name} must not be float64 on {value.device}: float64 is for checks on the CPU")


def _fits(found: Sequence[int], shape: Sequence[int | None]) -> bool:
    return len(found) == len(shape) and all(want is None or got == want for want, got in zip(shape, found, strict=True))


def rank(name: str, value: Tensor, ranks: Sequence[int], layout: str) -> None:
    """The number of dimensions alone, before sizes are unpacked; `layout` names them, as "(batch, seqlen, dim)"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() not in ranks:
        raise ValueError(f"{name} must have shape {layout}, got {tuple(value.shape)}")


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def number(name: str, value: object) -> None:
    """A tensor's value would be read once and remembered for others: no signature holds it."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor")


def at_most_one(**given: object) -> None:
    present = [name for name, value in given.items() if value is not None]
    if len(present) > 1:
        raise ValueError(f"at most one of {', '.join(given)} may be given, got {' and '.join(present)}")


def out(value: Tensor | None, like: Tensor, needs_grad: bool) -> None:
    """`out=` has exactly the result's shape, dtype and device, and no part in a graph of gradients."""
    if value is None:
        return
    tensor("out", value, like.shape, dtype=like.dtype, device=like.device)
    if needs_grad:
        raise ValueError("out must be None where a gradient is needed, got a tensor: use torch.no_grad() or drop out=")


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def no_gradient(**given: Tensor | None) -> None:
    """For an op without a backward: refuse tensors whose gradient would silently be missing."""
    if not torch.is_grad_enabled():
        return
    for name, value in given.items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient, got one that does: use torch.no_grad() or detach()")


def updatable(name: str, value: Tensor) -> None:
    """A tensor that is read and written in place has each element in a place of its own, so no expanded dimension."""
    if torch.compiler.is_compiling() or value.numel() == 0:
        return
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(f"{name} must not have expanded dimensions, got strides {value.stride()}")


def readable(value: Tensor) -> bool:
    """Whether the values of an index tensor may be looked at here."""
    if torch.compiler.is_compiling() or isinstance(value, torch._subclasses.FakeTensor):
        return False
    if value.device.type == "cpu":
        return True
    return _env.check_values() and not torch.cuda.is_current_stream_capturing()


def cu_seqlens(value: Tensor, total: int, device: torch.device) -> int:
    """Boundaries of packed sequences, (nseq+1,) int32 from 0 up to `total`; returns nseq."""
    rank("cu_seqlens", value, (1,), "(nseq + 1,)")
    tensor("cu_seqlens", value, (None,), dtype=torch.int32, device=device)
    if value.numel() == 0:
        raise ValueError("cu_seqlens must have shape (nseq + 1,), got (0,)")
    if readable(value):
        bounds = value.tolist()
        if bounds[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}")
        if any(after < before for before, after in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens must not fall, got {_short(bounds)}")
        if bounds[-1] != total:
            raise ValueError(f"cu_seqlens must end at the number of tokens, {total}, got {bounds[-1]}")
    return value.numel() - 1


def slots(
    name: str, value: Tensor, shape: Sequence[int | None], nslots: int, null_slot: int, device: torch.device
) -> None:
    """Row numbers of a state pool, int32; a number that is neither `null_slot` nor in [0, nslots) is an error."""
    tensor(name, value, shape, dtype=torch.int32, device=device)
    if readable(value):
        bad = value[(value != null_slot) & ((value < 0) | (value >= nslots))]
        if bad.numel():
            raise ValueError(f"{name} must be in [0, {nslots}) or null_slot={null_slot}, got {int(bad[0])}")


def distinct(name: str, value: Tensor, nslots: int, null_slot: int) -> None:
    """Slots that are written must differ from each other, or two sequences would race for one row."""
    if readable(value):
        rows = value.flatten()
        rows = rows[(rows != null_slot) & (rows >= 0) & (rows < nslots)]
        if rows.unique().numel() != rows.numel():
            raise ValueError(f"{name} must be distinct, got {_short(value.flatten().tolist())}")


def _shape(shape: Sequence[int | None]) -> str:
    inner = ", ".join("*" if size is None else str(size) for size in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 16 else f"[{', '.join(map(str, values[:16]))}, ...]"
