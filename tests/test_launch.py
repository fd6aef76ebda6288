"""What launches rely on, for every kernel of the library."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from triton.runtime.jit import JITFunction

import hybrid_ops.triton_kernels as package


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
