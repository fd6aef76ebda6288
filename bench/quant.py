"""Quantisers, of a layer's activations. Their results are bytes, compared with the torch implementation's."""

import itertools
from collections.abc import Iterator

import torch

import hybrid_ops

from . import peers
from .cases import MODELS, WIDTHS, Case, Tensors, randn

TOKENS = 8192


def cases(on_gpu: bool) -> Iterator[Case]:
    model, rows = ("super", TOKENS) if on_gpu else ("tiny", 256)
    for scaling in ("tensor", "row", "1x128", "128x128", "mx"):
        yield fp8(model, rows, scaling)
    yield fp8(model, rows, "1x128", orientation="column")
    yield nvfp4(model, rows)
    yield nvfp4(model, rows, "swizzled", scale_layout="128x4")
    yield nvfp4(model, rows, "column-hadamard", orientation="column", hadamard=True)
    yield nvfp4(model, rows, "16x16", block="16x16")
    yield nvfp4(model, rows, "modelopt-4over6", mode="modelopt", four_over_six="mse")
    yield dequantized(model, rows, "fp8")
    yield dequantized(model, rows, "nvfp4")


def sweep() -> Iterator[Case]:
    for model, rows in itertools.product(WIDTHS, (64, 512, 8192, 131072)):
        for scaling in ("row", "1x128", "mx"):
            yield fp8(model, rows, scaling)
        yield nvfp4(model, rows)


def quantizer(public: str, model: str, rows: int, suffix: str, read: int, scale_bytes: int, **options: object) -> Case:
    """x is read `read` times: twice where its largest magnitude comes first."""
    hidden = MODELS[model].hidden

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        return {"x": randn(generator, rows, hidden)}

    def call(t: Tensors, impl: str) -> Tensors:
        q = getattr(hybrid_ops, public)(t["x"], **options, impl=impl)
        scale = q.scale.view(torch.int32 if q.scale.dtype == torch.float32 else torch.uint8)  # bits
        return {"data": q.data.view(torch.uint8), "scale": scale}

    data_bytes = rows * hidden // (2 if public == "nvfp4_quantize" else 1)
    return Case(
        op=public,
        public=public,
        name=f"{model}-T{rows}-{suffix}",
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call(t, "torch"),
        axis={},
        bytes=2 * read * rows * hidden + data_bytes + scale_bytes,
        flops=0,
        impls=("triton",),
        problem={"scaling": options.get("scaling", "row"), "K": hidden},
        # the signs of the Hadamard transform come from the host, which a CUDA graph does not allow
        peers={} if "hadamard" in options else peers.own_torch(call, model),
    )


def fp8(model: str, rows: int, scaling: str, **options: object) -> Case:
    hidden = MODELS[model].hidden
    tiles = {"tensor": 0, "row": rows, "1x128": rows * hidden // 128, "128x128": rows * hidden // 128**2}
    scale_bytes = 4 * tiles[scaling] if scaling in tiles else rows * hidden // 32
    suffix = "-".join([scaling, *map(str, options.values())])
    read = 2 if scaling == "tensor" else 1
    return quantizer("fp8_quantize", model, rows, suffix, read, scale_bytes, scaling=scaling, **options)


def nvfp4(model: str, rows: int, suffix: str = "1x16", **options: object) -> Case:
    return quantizer("nvfp4_quantize", model, rows, suffix, 2, rows * MODELS[model].hidden // 16, **options)


def dequantized(model: str, rows: int, kind: str) -> Case:
    hidden, public = MODELS[model].hidden, f"{kind}_dequantize"

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        x = randn(generator, rows, hidden)
        q = getattr(hybrid_ops, f"{kind}_quantize")(x, impl="torch")
        return {name: t for name, t in q._asdict().items() if isinstance(t, torch.Tensor)}

    def call(t: Tensors, impl: str) -> Tensors:
        q = (
            hybrid_ops.Fp8Tensor(**t, scaling="row")
            if kind == "fp8"
            else hybrid_ops.Nvfp4Tensor(**t, scale_layout="linear")
        )
        return {"y": getattr(hybrid_ops, public)(q, impl=impl)}

    packed = rows * hidden + 4 * rows if kind == "fp8" else rows * hidden // 2 + rows * hidden // 16
    return Case(
        op=public,
        public=public,
        name=f"{model}-T{rows}",
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call(t, "torch"),
        axis={"y": -2},
        bytes=2 * rows * hidden + packed,
        flops=0,
        impls=("triton",),
        problem={"K": hidden},
        peers=peers.own_torch(call, model),
    )
