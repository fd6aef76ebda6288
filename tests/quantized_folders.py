"""Folders with quantised weights, without the loader: written tensor by tensor, what the weights are worth, and whether
their metadata says what they are."""

import fnmatch
import json

import torch
from safetensors.torch import load_file, save_file

import hybrid_ops
from hybrid_ops.models import NemotronHConfig, NemotronHForCausalLM

from .random_models import COMMON, CONFIGS, redraw

# every kind of layer, latent experts and a head that drafts, in sizes that NVFP4 can have
SIZES = CONFIGS["moe-latent"] | dict(
    hybrid_override_pattern="ME*-",
    moe_latent_size=32,
    n_routed_experts=8,
    num_experts_per_tok=3,
    num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)
UNQUANTIZED = ("embeddings", "norm", "gate.", "conv1d", "A_log", ".D", "_bias", ".bias")


def all_nvfp4(name):
    return "nvfp4"


def all_fp8(name):
    return "fp8"


def as_super(name):
    """As Nemotron 3 Super: routed experts NVFP4, shared experts and Mamba-2 projections FP8, others as they are."""
    if ".experts." in name:
        return "nvfp4"
    return "fp8" if "shared_experts" in name or "in_proj" in name or "out_proj" in name else None


@torch.no_grad()
def build(**changes):
    model = redraw(NemotronHForCausalLM(NemotronHConfig(**SIZES | COMMON | changes)))
    for name, parameter in model.named_parameters():
        if name.endswith("correction_bias"):
            parameter.mul_(0.1)  # so that every expert gets tokens
    return model


def store(name, weight, form, input_scale=None):
    """The tensors of one quantised weight under ModelOpt's names."""
    module = name.removesuffix("weight")
    if form == "nvfp4":
        q = hybrid_ops.nvfp4_quantize(weight.float(), mode="modelopt")
        stored = {"weight": q.data, "weight_scale": q.scale, "weight_scale_2": q.tensor_scale}
    else:
        q = hybrid_ops.fp8_quantize(weight.float(), "row" if form == "fp8-row" else "tensor")
        stored = {"weight": q.data, "weight_scale": q.scale.squeeze(-1) if form == "fp8-row" else q.scale}
    if input_scale is not None:
        stored["input_scale"] = torch.tensor(input_scale)
    return {module + own: tensor for own, tensor in stored.items()}


def worth(weight, scale, scale_2=None):
    """The matrix that the stored tensors stand for, float32, by ModelOpt's definition."""
    if scale_2 is None:
        return weight.float() * (scale[:, None] if scale.dim() else scale)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(-2).long()
    signed = torch.where(codes < 8, values[codes % 8], -values[codes % 8])
    return signed * scale.float().repeat_interleave(16, dim=-1) * scale_2


def write(model, folder, form_of, input_scale=None):
    """Save the model with each weight in the format that `form_of(name)` says; returns the tensors on disk."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        form = None if any(part in name for part in UNQUANTIZED) else form_of(name)
        tensors |= {name: tensor} if form is None else store(name, tensor, form, input_scale)
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def dequantized(tensors):
    """The tensors of an unquantised checkpoint with the same values."""
    plain = {}
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        if own == "weight" and f"{module}.weight_scale" in tensors:
            plain[name] = worth(tensor, tensors[f"{module}.weight_scale"], tensors.get(f"{module}.weight_scale_2"))
        elif own not in ("weight_scale", "weight_scale_2", "input_scale"):
            plain[name] = tensor
    return plain


def write_dequantized(model, tensors, folder):
    """The same model unquantised, as a folder of its own."""
    model.save_pretrained(folder)
    save_file(dequantized(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def declare(folder, quantization_config):
    """Set config.json's quantization_config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(quantization_config=quantization_config)))


def read(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def stored_format(tensors, module):
    """By the tensors alone."""
    if f"{module}.weight_scale_2" in tensors:
        return "nvfp4"
    return "fp8" if f"{module}.weight_scale" in tensors else "keep"


def stored_algorithm(tensors, module):
    """ModelOpt's name for it, None for a matrix that is not quantised."""
    scaled = f"{module}.input_scale" in tensors
    match stored_format(tensors, module):
        case "nvfp4":
            return "NVFP4" if scaled else "W4A16_NVFP4"
        case "fp8":
            return "FP8_PER_CHANNEL_PER_TOKEN" if tensors[f"{module}.weight_scale"].dim() else "FP8"


def declared(folder):
    """Check the metadata as a reader goes by it: for each matrix on disk, what is declared is what is stored."""
    config = json.loads((folder / "config.json").read_text())
    legacy = json.loads((folder / "hf_quant_config.json").read_text())
    inline, said = config["quantization_config"], legacy["quantization"]
    assert inline["quant_method"] == "modelopt"
    assert inline["quant_algo"] == said["quant_algo"]
    assert inline["ignore"] == said["exclude_modules"]
    assert inline.get("quantized_layers") == said.get("quantized_layers")
    assert inline["producer"] == legacy["producer"]
    assert said["kv_cache_quant_algo"] is None
    assert legacy["producer"]["name"] == "hybrid-ops"
    mixed = said["quant_algo"] == "MIXED_PRECISION"
    groups = inline["config_groups"].values()
    assert mixed or [group["targets"] for group in groups] == [["Linear"]]
    tensors = read(folder)
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or tensor.dim() < 2 or "embeddings" in name:
            continue
        if any(fnmatch.fnmatch(module, pattern) for pattern in said["exclude_modules"]):
            says = None
        else:  # vLLM excludes whatever has an excluded name in its own
            assert not any(excluded in module for excluded in said["exclude_modules"])
            layer = said["quantized_layers"][module] if mixed else said
            assert layer.get("group_size") == (16 if "NVFP4" in layer["quant_algo"] else None)
            says = layer["quant_algo"]
        assert says == stored_algorithm(tensors, module), module
        mine = [group for group in groups if not mixed or module in group["targets"]] if says or mixed else []
        assert len(mine) == (says is not None), module
        for group in mine:
            assert group["weights"]["num_bits"] == (4 if "NVFP4" in says else 8)
            assert ("strategy" in group["weights"]) == (says == "FP8_PER_CHANNEL_PER_TOKEN")
            assert ("input_activations" in group) == (says != "W4A16_NVFP4")
    return said
