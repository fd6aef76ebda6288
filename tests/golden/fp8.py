"""Golden bytes of FP8, as a CRC32 of each row of codes and of scales; `make.py` makes them.

By Transformer Engine's `tests/pytorch/references` ("tensor", "1x128", "128x128") and ModelOpt's `MXFP8QTensor` ("mx").
Inputs leave out what differs: infinity and NaN; in "mx", blocks of zeros, whose scale is 2^-127 there and 1 here, and
(too rare to occur) float32 magnitudes up to some 30 units in the last place above 448 * 2^n, which a logarithm in
float32 takes for 448 * 2^n there; in bfloat16, blocks of Transformer Engine so small that largest / amax overflows: it
puts bfloat16's largest number there, this library float32's. Scales are compared without their padding.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .upstream import fp8_references
from .values import values

FILE = Path(__file__).parent / "fp8.npz"


class Golden(NamedTuple):
    """A case: options of `fp8_quantize`, and shape and dtype of the inputs."""

    options: dict
    shape: tuple
    dtype: torch.dtype = torch.float32


# (.., M, K): more than 10,000 tiles of each mode; of 128x128 most are two rows high, whole ones are in "square"
SHAPES = {
    "tensor": dict(tensor=(128, 80, 4, 32)),
    "1x128": dict(row=(8, 80, 2000)),
    "128x128": dict(flat=(640, 2, 2000), square=(4, 260, 520)),
}
KINDS = {"e4m3": (torch.float8_e4m3fn, torch.float32), "e5m2": (torch.float8_e5m2, torch.bfloat16)}
CASES = {
    f"{name}_{kind}{'_pow2' * pow2}": Golden(dict(scaling=scaling, dtype=target, pow2_scale=pow2), shape, dtype)
    for scaling, shapes in SHAPES.items()
    for name, shape in shapes.items()
    for kind, (target, dtype) in KINDS.items()
    for pow2 in (False, True)
}
CASES["mx"] = Golden(dict(scaling="mx", dtype=torch.float8_e4m3fn), (8, 80, 500))


def inputs(name):
    """float32: up to its largest number, and down to subnormal numbers where the dtype is float32."""
    options, shape, dtype = CASES[name]
    half = dtype == torch.bfloat16
    return values(
        list(CASES).index(name) + 100,
        shape,
        [0, 127, -3, -80, 40, -40, 5, 1] if half else [0, 127, -3, -126, 40, -40, 5, -112],
        block=32 if options["scaling"] in ("tensor", "mx") else 128,
        spread=32,
        ties=0x780000,
        bfloat16=slice(None, None, 1 if half else 2),
        zero_blocks=options["scaling"] != "mx",
    )


def digests(array, dims):
    """uint32: a CRC32 of the bytes at each index of the first `dims` dimensions."""
    rows = array.reshape(-1, int(np.prod(array.shape[dims:])))
    return np.array([zlib.crc32(row.tobytes()) for row in rows], np.uint32).reshape(array.shape[:dims])


def digests_of(data, scale):
    """Of each matrix with a scale of its own, or of each row; of each row of scales."""
    return digests(data, 2), digests(scale, scale.ndim - 1)


def by_transformer_engine(references, x, scaling, dtype, pow2_scale):
    """(data, scale) of one matrix."""
    of_tensor, of_blocks = references
    if scaling == "tensor":
        data, scale, *_ = of_tensor(x, dtype, force_pow_2_scales=pow2_scale)
        return data, scale[0]
    tile = tuple(map(int, scaling.split("x")))
    q = of_blocks(x, dtype, pow_2_scales=pow2_scale, quant_tile_shape=tile, munge_scale_shapes=False)
    return q.data, q.scale


def by_modelopt(x):
    from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor

    q, scale = MXFP8QTensor.quantize(x)
    return q._quantized_data, scale


def make(folder):
    references, arrays = fp8_references(folder), {}
    for name, (options, shape, dtype) in CASES.items():
        results = []
        for matrix in torch.from_numpy(inputs(name)).to(dtype).view(-1, *shape[-2:]):
            mx = options["scaling"] == "mx"
            results.append(by_modelopt(matrix) if mx else by_transformer_engine(references, matrix, **options))
        data, scale = (torch.stack(parts).unflatten(0, shape[:-2]) for parts in zip(*results, strict=True))
        codes = data.view(torch.uint8).numpy()
        arrays[f"{name}_data"], arrays[f"{name}_scale"] = digests_of(codes, scale.numpy())
    np.savez_compressed(FILE, **arrays)
