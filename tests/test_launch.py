"""What launches rely on, for every kernel of the library."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from triton.runtime.jit import JITFunction

import hybrid_ops
import hybrid_ops.triton_kernels as package
from hybrid_ops.triton_kernels import launch


def kernels():
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"{package.__name__}.{module.name}")).values()
        yield from (k for k in members if isinstance(k, JITFunction) and k.__module__.endswith(f".{module.name}"))


KERNELS = [k for k in kernels() if k.__name__.endswith("_kernel")]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_tensors_then_scalars_then_constants(kernel):
    kinds = [2 if p.is_constexpr else 0 if p.name.endswith("_ptr") else 1 for p in kernel.params]
    assert kinds == sorted(kinds)
    assert kinds[0] == 0


def test_names_are_keys():
    names = [k.__name__ for k in KERNELS]
    assert len(names) > 15
    assert len(set(names)) == len(names)


def test_no_launch_but_through_launch():
    for path in Path(package.__path__[0]).glob("*.py"):
        assert path.name == "launch.py" or not re.findall(r"_kernel\[|\.warmup\(|\]\(\n", path.read_text()), path


def test_plans_are_made_once_for_each_key_on_a_gpu():
    made = []

    def make():
        made.append(None)  # a plan may be None: strides that kernels do not take

    for device, times in (("cuda:0", 1), ("cuda:1", 1), ("cpu", 2)):
        made.clear()
        for _ in range(2):
            assert launch.plan(("test", 1), make, torch.device(device)) is None
        assert len(made) == times, device


def test_traits():
    """Two tensors with equal traits have the same specialisation: shape, strides, dtype, alignment of the address."""
    memory = torch.zeros(64)
    base = memory[:16].view(4, 4)
    others = (base.mT, base[:2], base.int(), memory[1:17].view(4, 4), None)
    assert launch.traits(base) == launch.traits(memory[16:32].view(4, 4))
    assert all(launch.traits(base) != launch.traits(other) for other in others)


@pytest.mark.gpu
def test_compile_only():
    """Kernels are compiled, in threads of autograd's too, and nothing is written; the next call runs them."""
    from hybrid_ops.triton_kernels import launch

    def tensors():
        y = torch.randn(3, 5, 24, device="cuda", requires_grad=True)
        return y, torch.arange(15, dtype=torch.int32, device="cuda").view(3, 5), y.detach().new_zeros(3, 24)

    y, rows, out = tensors()
    with launch.compile_only():
        hybrid_ops.moe_combine(y.detach().view(15, 24), rows, out=out)
        hybrid_ops.moe_combine(y.view(15, 24), rows).sum().backward()
    assert not out.any()
    y.grad = None
    hybrid_ops.moe_combine(y.detach().view(15, 24), rows, out=out)
    torch.testing.assert_close(out, y.detach().sum(1))
    hybrid_ops.moe_combine(y.view(15, 24), rows).sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
