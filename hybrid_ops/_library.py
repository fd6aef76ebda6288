"""Registration of the torch operators, and `explain`.

Operators are plumbing: each one fills tensors that its caller allocated and returns nothing, so one schema serves
results, `out=` and in-place pools alike, and every fake implementation is the same empty function. `Library.define` and
`Library.impl` cost 5 us a call where `torch.library.custom_op` costs 12; with 30 arguments it is 20 us, for each one is
converted there and back. So where the dispatcher has nothing to do (`_is_plain`), the library's calls pass it by.
The caller's `x.new_empty(*x.shape)` takes 0.8 us less than `x.new_empty(x.shape)`.
"""

from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

import torch

_LIBRARY = torch.library.Library("hybrid_ops", "DEF")  # dropping it would unregister every operator

IMPLS = ("auto", "cuda", "triton", "torch")


class Choice(NamedTuple):
    """Which implementation runs a problem, with which kernel configuration, and why."""

    impl: str
    config: dict[str, Any]
    reason: str


_EXPLAINERS: dict[str, Callable[..., Choice]] = {}


_PLAIN = {torch.Tensor, torch.nn.Parameter, NoneType, bool, int, float, str}


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether an eager call of ordinary CPU or CUDA tensors, which nothing traces, transforms or profiles."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()  # a mode: fake tensors, make_fx, ...
        or torch._C._functorch.peek_interpreter_stack()  # vmap, grad, functionalize
        or torch.autograd._profiler_enabled()
        or not (arguments[0].is_cuda or arguments[0].is_cpu)
        or not _PLAIN.issuperset(map(type, arguments))  # a subclass of Tensor, a symbolic size
    )


class Operator:
    """An operator of `torch.ops.hybrid_ops`, as the library itself calls it."""

    def __init__(self, run: Callable[..., None], overload: torch._ops.OpOverload) -> None:
        self._run, self._overload = run, overload

    def __call__(self, *arguments: Any, run: Callable[..., None] | None = None) -> None:
        """`run`: what a plain call comes to, where that was found out when the arguments were checked."""
        ((run or self._run) if _is_plain(arguments) else self._overload)(*arguments)


def define(schema: str, run: Callable[..., None]) -> Operator:
    """Register `run` for CPU and CUDA under `schema`, whose outputs are mutated arguments, and return the operator."""
    name = schema.partition("(")[0]
    _LIBRARY.define(f"{schema} -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"hybrid_ops::{name}", _fill_nothing, lib=_LIBRARY)
    return Operator(run, getattr(torch.ops.hybrid_ops, name).default)


def _fill_nothing(*args: Any, **kwargs: Any) -> None:
    """The fake implementation of every operator: shapes are decided by the caller, who allocates."""


def explains(op: str) -> Callable[[Callable[..., Choice]], Callable[..., Choice]]:
    """Mark the function that chooses the implementation of the public function `op`."""

    def mark(choose: Callable[..., Choice]) -> Callable[..., Choice]:
        _EXPLAINERS[op] = choose
        return choose

    return mark


def explain(op: str, **problem: Any) -> Choice:
    """Say which implementation `op` would use for a problem, its configuration, and the reason.

    `problem` takes `device` ("cpu", "cuda"), `dtype`, `impl` and the sizes of the op's own signature; whatever is left
    out has the op's usual value.

    >>> hybrid_ops.explain("rms_norm", device="cpu").impl
    'torch'
    """
    if op not in _EXPLAINERS:
        raise ValueError(f"op must be one of {', '.join(sorted(_EXPLAINERS))}, got {op!r}")
    return _EXPLAINERS[op](**problem)


def ops() -> tuple[str, ...]:
    """The public functions that `explain` knows."""
    return tuple(sorted(_EXPLAINERS))
