"""A quantised model computes what the model on its dequantised weights computes."""

import pytest
import torch
from safetensors.torch import save_file

from hybrid_ops.models import NemotronHForCausalLM, speculate

from .quantized_folders import all_fp8, all_nvfp4, as_super, build, write, write_dequantized
from .random_models import MTP_CONFIGS

load = NemotronHForCausalLM.from_pretrained
IDS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
PLAIN_EXPERTS = dict(moe_latent_size=None)
DENSE = dict(hybrid_override_pattern="M*-M", num_nextn_predict_layers=0)
PUZZLE = MTP_CONFIGS["puzzle"] | dict(
    block_configs=({}, dict(moe_intermediate_size=48), dict(n_routed_experts=6, moe_latent_size=16), {}),
    mtp_block_configs=None,
)


def pair(tmp_path, form_of, input_scale=None, dtype=None, device=None, **changes):
    """A quantised model, and the unquantised one with the same values."""
    model = build(**changes)
    tensors = write(model, tmp_path / "quantized", form_of, input_scale)
    write_dequantized(model, tensors, tmp_path / "plain")
    folders = (tmp_path / "quantized", tmp_path / "plain")
    return [load(folder, dtype=dtype, device=device).requires_grad_(False) for folder in folders]


def rms(x):
    return float(x.double().square().mean().sqrt())


def outputs(model, ids=IDS):
    """Logits of the model and of its multi-token prediction head."""
    if model.mtp is None:
        return (model(ids),)
    logits, further = model(ids, mtp_depth=2)
    return logits, *further


def assert_parity(quantized, plain, ids=IDS):
    for out, expected in zip(outputs(quantized, ids), outputs(plain, ids), strict=True):
        assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


def up_only(name):
    return "nvfp4" if "up_proj" in name else None


def experts_only(name):
    return "nvfp4" if ".experts." in name else None


def latent_only(name):
    return "nvfp4" if "latent_proj" in name else None


@pytest.mark.parametrize(
    ("form_of", "changes"),
    [
        (all_nvfp4, {}),
        (all_nvfp4, PLAIN_EXPERTS),
        (all_nvfp4, PUZZLE),
        (all_nvfp4, dict(n_group=4, topk_group=2, norm_topk_prob=False)),
        (up_only, PLAIN_EXPERTS),
        (experts_only, {}),
        (latent_only, {}),
    ],
)
def test_nvfp4(form_of, changes, tmp_path):
    """Codes times scales are exact in float32, so what remains is the order of sums. `input_scale` changes nothing."""
    quantized, plain = pair(tmp_path, form_of, input_scale=0.5, **changes)
    assert_parity(quantized, plain)
    assert_parity(load(tmp_path / "quantized", dequantize=True).requires_grad_(False), plain)


def test_greedy_tokens(tmp_path):
    quantized, plain = pair(tmp_path, all_nvfp4)
    tokens = quantized.generate(IDS[:, :8], 48)
    assert tokens.shape == (2, 48)
    assert len(set(tokens.flatten().tolist())) > 10
    assert tokens.equal(plain.generate(IDS[:, :8], 48))


def test_nvfp4_bfloat16(tmp_path):
    """Away from the truth by at most twice what the dequantised model in bfloat16 is, as for every op.

    That one rounds its weights to bfloat16 too; the quantised ones are exact.
    """
    quantized, plain = pair(tmp_path, all_nvfp4, dtype=torch.bfloat16)
    exact = load(tmp_path / "plain", dtype=torch.float64).requires_grad_(False)(IDS)
    error, base = rms(quantized(IDS) - exact), rms(plain(IDS) - exact)
    assert 0 < error <= 2 * base
    assert base < 0.2 * rms(exact)  # otherwise the bound would say nothing


EXPERT = "backbone.layers.1.mixer.experts.4."
SHARED = "backbone.layers.1.mixer.shared_experts."


@pytest.mark.parametrize("name", [f"{EXPERT}up_proj.", f"{EXPERT}down_proj.", f"{SHARED}up_proj.", "lm_head."])
@pytest.mark.parametrize("mutation", ["scale", "nibbles", "next scale"])
def test_every_part_of_a_weight_matters(name, mutation, tmp_path):
    """Parity is to 1e-4; each of these is seen ten times over."""
    tensors = write(build(), tmp_path, all_nvfp4)
    expected = load(tmp_path)(IDS)
    weight, scale = tensors[f"{name}weight"], tensors[f"{name}weight_scale"]
    if mutation == "scale":
        tensors[f"{name}weight_scale_2"] *= 1.01
    elif mutation == "nibbles":
        tensors[f"{name}weight"] = weight >> 4 | weight << 4
    else:
        tensors[f"{name}weight_scale"] = scale.float().roll(1, dims=1).to(scale.dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    assert (load(tmp_path)(IDS) - expected).abs().max() > 1e-3 * expected.abs().max()


def to_e4m3(x, scale):
    return (x * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def round_inputs(model, input_scale):
    """Round what goes into every linear layer that is called, as FP8 products do."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args: (
                    to_e4m3(args[0], input_scale or args[0].abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448),
                )
            )
    return model


@pytest.mark.parametrize("form", ["fp8", "fp8-row"])
@pytest.mark.parametrize("input_scale", [None, 0.02])
def test_fp8(form, input_scale, tmp_path):
    """The dequantised model with the input of every linear layer rounded to E4M3, by the static scale or row by row."""
    quantized, plain = pair(tmp_path, lambda name: form, input_scale, **DENSE)
    expected = round_inputs(plain, input_scale)(IDS)
    error = (quantized(IDS) - expected).abs().amax(-1)
    # an input so near the middle between two codes that the order of sums decides would move later tokens: rare
    assert (error <= 1e-4 * expected.abs().max()).float().mean() > 0.75


@pytest.mark.parametrize("form_of", [all_fp8, as_super])
@pytest.mark.parametrize("changes", [{}, PLAIN_EXPERTS, dict(moe_latent_size=16)])
def test_fp8_experts(form_of, changes, tmp_path):
    """Rows that meet experts are rounded too; away by at most twice what rounding the other layers' inputs costs."""
    quantized, plain = pair(tmp_path, form_of, **changes)
    exact = plain(IDS)
    base = rms(round_inputs(plain, None)(IDS) - exact)
    assert 0 < rms(quantized(IDS) - exact) <= 2 * base
    assert base < 0.2 * rms(exact)


@pytest.mark.parametrize("form_of", [all_nvfp4, as_super])
def test_generation(form_of, tmp_path):
    """Steps through a cache, packed and padded prompts, and drafts."""
    quantized, _ = pair(tmp_path, form_of)
    expected, cache = quantized(IDS), quantized.new_cache(2)
    steps = [quantized(piece, cache=cache) for piece in IDS.split([30, 8, 1, 1], dim=1)]
    error = (torch.cat(steps, dim=1) - expected).abs().amax(-1)
    assert (error <= 1e-4 * expected.abs().max()).float().mean() > 0.75  # as in test_fp8
    packed = quantized(IDS.reshape(1, -1), cu_seqlens=torch.tensor([0, 40, 80], dtype=torch.int32))
    assert ((packed.view_as(expected) - expected).abs() <= 1e-4 * expected.abs().max()).float().mean() > 0.75
    tokens = quantized.generate(IDS[:, :8], 16)
    result = speculate(quantized, IDS[:, :8], 16, num_draft_tokens=3)
    assert len(result.acceptance) == 3
    assert quantized.generate(IDS[:, :8], 16, num_draft_tokens=3).equal(tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("form_of", [all_nvfp4, as_super])
def test_gpu(form_of, tmp_path):
    """On a GPU as on the CPU."""
    quantized, plain = pair(tmp_path, form_of, device="cuda")
    if form_of is all_nvfp4:
        assert_parity(quantized, plain, IDS.cuda())
    on_cpu = load(tmp_path / "quantized")(IDS)
    error = (quantized(IDS.cuda()).cpu() - on_cpu).abs().amax(-1)
    assert (error <= 1e-3 * on_cpu.abs().max()).float().mean() > 0.75  # as in test_fp8
