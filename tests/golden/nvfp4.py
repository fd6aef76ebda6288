"""Golden bytes of NVFP4: what the quantisers that `mode` names make of fixed inputs; `make.py` makes them.

The inputs are finite: of infinity and NaN the two upstream quantisers make NaN scales, this library does not.
"""

import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .upstream import nvfp4_reference
from .values import values

FILE = Path(__file__).parent / "nvfp4.npz"
MATRICES, ROWS, COLUMNS = 8, 80, 256  # 10,240 blocks


class Golden(NamedTuple):
    """A case: options of `nvfp4_quantize`, and the dtype of the inputs (float32: half of the matrices are bfloat16)."""

    options: dict
    dtype: torch.dtype = torch.float32


CASES = {
    "te": Golden(dict(mode="te")),
    "te_16x16": Golden(dict(mode="te", block="16x16")),
    "te_hadamard": Golden(dict(mode="te", hadamard=True), torch.bfloat16),
    "te_mse": Golden(dict(mode="te", four_over_six="mse")),
    "te_mae": Golden(dict(mode="te", four_over_six="mae")),
    "te_16x16_mae": Golden(dict(mode="te", four_over_six="mae", block="16x16")),
    "modelopt": Golden(dict(mode="modelopt")),
    "modelopt_mse": Golden(dict(mode="modelopt", four_over_six="mse")),
}


def inputs(name):
    """float32 (MATRICES, ROWS, COLUMNS).

    In a block exponents lie within 10 of each other, so that a Hadamard transform of bfloat16 values is exact in
    float32 in any order of its sums.
    """
    return values(
        1 + list(CASES).index(name),
        (MATRICES, ROWS, COLUMNS),
        [0, -3, 5, -40, 40, -90, 90, 1],
        block=16,
        spread=10,
        ties=0x600000,  # quarters: of the scales too
        bfloat16=slice(None, None, 1 if CASES[name].dtype == torch.bfloat16 else 2),
    )


def by_transformer_engine(modules, x, options):
    """(data, scale) of one matrix; the transform belongs to the columnwise copy there, so x goes in transposed."""
    reference, utils = modules
    hadamard, four_over_six = options.get("hadamard", False), options.get("four_over_six")
    quantizer = reference.NVFP4QuantizerRef(
        utils.Fp4Formats.E2M1,
        rowwise=not hadamard,
        columnwise=hadamard,
        quant_tile_shape=(16, 16) if options.get("block") == "16x16" else (1, 16),
        with_rht=hadamard,
        nvfp4_use_4over6=four_over_six is not None,
        nvfp4_e4m3_max=448 if four_over_six is None else 256,
        nvfp4_4over6_err_mode=(four_over_six or "mae").upper(),
    )
    q = quantizer.quantize(x.T.contiguous() if hadamard else x)
    return (q.data_t, q.scale_t) if hadamard else (q.data, q.scale)


def by_modelopt(x, options):
    """(data, scale) of one matrix; four over six as its calibrator of mean squared errors chooses for a checkpoint."""
    from modelopt.torch.quantization.calib.mse import MseCalibrator
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    if options.get("four_over_six") is None:
        q, scale, _ = NVFP4QTensor.quantize(x, 16)
        return q._quantized_data, scale
    quantizer = types.SimpleNamespace(block_sizes={-1: 16, "four_over_six": True}, global_amax=x.abs().max().float())

    def export(amax):
        quantizer._amax = amax.clone()
        scale, scale_2 = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, x)
        return *NVFP4QTensor.quantize(x, 16, scale, scale_2)[:2], scale_2

    def fake_quantize(_, amax):
        q, scale, scale_2 = export(amax)
        y = q.dequantize(dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
        return y.view(-1, 16)

    amax = x.view(-1, 16).abs().amax(1).float()
    calibrator = MseCalibrator(
        amax, axis=0, step_size=0.5, start_multiplier=1.0, stop_multiplier=1.5, quant_func=fake_quantize
    )
    calibrator.collect(x.view(-1, 16))
    q, scale, _ = export(calibrator.compute_amax())
    return q._quantized_data, scale


def make(folder):
    modules, arrays = nvfp4_reference(folder), {}
    for name, (options, dtype) in CASES.items():
        results = []
        for matrix in torch.from_numpy(inputs(name)).to(dtype):
            te = options["mode"] == "te"
            results.append(by_transformer_engine(modules, matrix, options) if te else by_modelopt(matrix, options))
        data, scale = (torch.stack([part.view(torch.uint8) for part in parts]) for parts in zip(*results, strict=True))
        arrays[f"{name}_data"], arrays[f"{name}_scale"] = data.numpy(), scale.numpy()
    np.savez_compressed(FILE, **arrays)
