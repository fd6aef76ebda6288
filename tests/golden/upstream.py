"""Transformer Engine's reference quantisers, without the package around them, which loads compiled code."""

import sys
import types
from pathlib import Path

import torch


def stub(name, path=(), **attributes):
    """A module of that name that has only these attributes, and its submodules in the folders of `path`."""
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [str(folder) for folder in path]
    vars(module).update(attributes)


def nvfp4_reference(folder):
    """The modules `quantization_ref_nvfp4` and `utils`."""

    class Quantizer:  # the base class only keeps what it is given
        def __init__(self, *, rowwise, columnwise):
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise

    stub("transformer_engine")
    stub("transformer_engine.pytorch")
    source = Path(folder) / "transformer_engine" / "pytorch" / "custom_recipes"
    stub("transformer_engine.pytorch.custom_recipes", [source])
    stub("transformer_engine.pytorch.quantized_tensor", Quantizer=Quantizer, QuantizedTensorStorage=object)
    from transformer_engine.pytorch.custom_recipes import quantization_ref_nvfp4, utils

    return quantization_ref_nvfp4, utils


def fp8_references(folder):
    """The function for a scale of the tensor, which names dtypes as torch does here, and the one for blocks."""
    dtypes = types.SimpleNamespace(kFloat8E4M3=torch.float8_e4m3fn)  # a default argument
    stub("transformer_engine")
    stub("transformer_engine.pytorch", DType=dtypes)
    stub(
        "transformer_engine.pytorch.constants",
        TE_DType_To_Torch={d: d for d in (torch.float8_e4m3fn, torch.float8_e5m2)},
    )
    stub("references", [Path(folder) / "tests" / "pytorch" / "references"])
    from references.blockwise_quantizer_reference import BlockwiseQuantizerReference
    from references.ref_per_tensor_cs import ref_per_tensor_cs_cast

    return ref_per_tensor_cs_cast, BlockwiseQuantizerReference().quantize
