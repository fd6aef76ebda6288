"""Compile Triton kernels for GPUs that are not here, exactly as their launchers would launch them.

Inside `compiling_for(sm)` a launcher may be called with CPU tensors: each launch is compiled to a cubin for that
architecture and not run. Yields the list of compiled kernels.
"""

import contextlib

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# shared memory of one block, KiB, by compute capability
SHARED_MEMORY_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


class _Driver:
    """The few questions that a launch asks its driver."""

    def __init__(self, sm):
        self.sm = sm

    def get_current_device(self):
        return self.sm  # kernels are cached per device: a number of its own for each architecture

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.sm, 32)

    def get_device_capability(self, device=0):
        return divmod(self.sm, 10)


@contextlib.contextmanager
def compiling_for(sm, monkeypatch):
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(triton.runtime.driver, "_active", _Driver(sm))
        yield compiled


def check(compiled, sm):
    """Each kernel has a cubin and fits this architecture's shared memory."""
    assert compiled, "the launcher launched nothing"
    for kernel in compiled:
        assert kernel.asm["cubin"], kernel.metadata.name
        used = kernel.metadata.shared / 1024
        assert used <= SHARED_MEMORY_KIB[sm], f"{kernel.metadata.name} needs {used:.0f} KiB of shared memory on sm_{sm}"
