"""What calls have in common that differ in values and addresses alone.

To look at ten tensors one by one, for a check or for the kernel that fits them, takes the host 20 us. So what was found
is kept under the signature of the arguments, which takes 0.5 us where the CUDA extension is built, and 5 without.
"""

from typing import Any

from torch import Tensor

from ._device import cuda_extension


def in_python(*arguments: Any) -> tuple[Any, ...] | None:
    """As `signature`, and equal to no key that the extension makes."""
    try:
        return tuple(
            [
                (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() % 16) if isinstance(a, Tensor) else a
                for a in arguments
            ]
        )
    except RuntimeError:
        return None


_extension = cuda_extension()

# signature(*arguments): a key, equal for tensors of the same shape, strides, dtype, device and alignment to 16 bytes
# (all that Triton specialises kernels on), and otherwise for equal arguments; None where a tensor has no address, as
# under vmap. Whether one requires a gradient is no part of it.
signature = in_python if _extension is None else _extension.signature
