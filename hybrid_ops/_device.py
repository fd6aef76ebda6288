"""What this machine has, and which implementation therefore runs."""

import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
from types import ModuleType

import torch

from ._library import IMPLS

NO_CUDA_KERNEL = "this op has no CUDA C++ kernel yet"


@functools.cache
def cuda_extension() -> ModuleType | None:
    """The compiled extension, or None where it was not built."""
    if importlib.util.find_spec("hybrid_ops._cuda") is None:
        return None
    extension = importlib.import_module("hybrid_ops._cuda")
    extension.learn_tensor_type(torch.Tensor)
    return extension


@functools.cache
def capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def not_sm90(device: torch.device) -> str | None:
    """Why kernels compiled for sm_90a do not run on `device`; None where they do, or where no GPU is here to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = capability(device.index or 0)
    return None if (major, minor) == (9, 0) else f"the CUDA kernel is for sm_90a, this GPU is sm_{major}{minor}"


@functools.cache
def num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_sms_to_explain(device: str | torch.device) -> int:
    """For `explain`, which may be asked about a GPU where there is none: then an H100's."""
    return num_sms(torch.device(device).index or 0) if torch.cuda.is_available() else 132


@functools.cache
def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before the import)."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot run on a GPU here, and what to install; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "Triton compiles its launcher against Python.h: apt-get install python3-dev"
    if shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton compiles its launcher with a C compiler: apt-get install gcc"
    return None


@functools.cache
def extension_missing() -> str | None:
    """Why the CUDA extension cannot be used, and how to get it; None where it can."""
    if cuda_extension() is None:
        return (
            "the CUDA extension was not built: pip install 'hybrid-ops[nvcc]' && pip install --no-deps "
            "nvidia-cutlass==4.2.0, then HYBRID_OPS_CUDA=1 pip install --no-build-isolation --force-reinstall "
            "--no-deps hybrid-ops"
        )
    return None


def choose(impl: str, device: torch.device, cuda: str | None = NO_CUDA_KERNEL) -> tuple[str, str]:
    """The implementation that runs and the reason; `cuda` is why the CUDA kernel cannot (None: it can).

    `auto` on a GPU is the CUDA kernel where it is built and takes the problem, otherwise Triton; on the CPU it is
    torch. A named implementation runs or raises: nothing falls back silently.
    """
    if impl == "torch":
        return impl, "named by the caller"
    if device.type != "cuda":
        if impl == "auto":
            return "torch", "the tensors are on the CPU"
        if impl == "triton" and triton_interpreted():
            return "triton", "Triton's interpreter (TRITON_INTERPRET=1)"
        hint = "; TRITON_INTERPRET=1 runs Triton kernels on the CPU, slowly" if impl == "triton" else ""
        raise RuntimeError(f"impl={impl!r} needs CUDA tensors, got tensors on {device}{hint}")
    if impl == "cuda":
        if (missing := cuda or extension_missing()) is not None:
            raise RuntimeError(f"impl='cuda' cannot run here: {missing}")
        return impl, "named by the caller"
    if impl == "auto" and cuda is None and extension_missing() is None:
        return "cuda", "the CUDA extension is built and takes this problem"
    if (missing := triton_missing()) is not None:
        raise RuntimeError(f"impl={impl!r} cannot run on {device}: {missing}; or pass impl='torch'")
    return "triton", "named by the caller" if impl == "triton" else f"no CUDA kernel: {cuda or 'extension not built'}"


def check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
