"""Hugging Face folders of models with experts and with a multi-token prediction head: names, memory, configurations."""

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybrid_ops.models import CheckpointError, NemotronHConfig, NemotronHForCausalLM, checkpoint

from .random_models import COMMON, CONFIGS, MTP_CONFIGS, redraw
from .test_checkpoint import assert_equal, edit_config, rewrite

NAMES = {name: values for name, values in (CONFIGS | MTP_CONFIGS).items() if "E" in values["hybrid_override_pattern"]}


def build(name, **factory):
    return redraw(NemotronHForCausalLM(NemotronHConfig(**NAMES[name] | COMMON), **factory))


@pytest.fixture(scope="module")
def model():
    return build("mtp-latent")


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def merge(tensors):
    """The experts of a layer in one tensor, as transformers 5 has them in memory."""
    merged = {}
    for name, tensor in tensors.items():
        before, dot, behind = name.partition(".experts.")
        number, _, projection = behind.partition(".")
        if dot:
            merged.setdefault(f"{before}.experts.{projection.removesuffix('.weight')}", {})[int(number)] = tensor
        else:
            merged[name] = tensor
    return {n: torch.stack([t[i] for i in range(len(t))]) if isinstance(t, dict) else t for n, t in merged.items()}


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, shard_bytes, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
    again = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_equal(again, model)
    assert not any(t.is_meta or t.isnan().any() for t in [*again.parameters(), *again.buffers()])
    assert not any(module.load.any() for module in again.modules() if hasattr(module, "load"))


def test_published_names(folder):
    """What is on disk, and what it is called in memory."""
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    layer = {
        "norm.weight": (48,),
        "mixer.gate.weight": (16, 48),
        "mixer.gate.e_score_correction_bias": (16,),
        "mixer.shared_experts.up_proj.weight": (80, 48),
        "mixer.shared_experts.down_proj.weight": (48, 80),
        "mixer.fc1_latent_proj.weight": (24, 48),
        "mixer.fc2_latent_proj.weight": (48, 24),
    }
    for e in range(16):
        layer |= {f"mixer.experts.{e}.up_proj.weight": (64, 24), f"mixer.experts.{e}.down_proj.weight": (24, 64)}
    for prefix in ("backbone.layers.1.", "mtp.layers.1."):
        assert {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)} == layer
    head = {
        "layers.0.enorm.weight": (48,),
        "layers.0.hnorm.weight": (48,),
        "layers.0.norm.weight": (48,),
        "layers.0.eh_proj.weight": (48, 96),
        "layers.0.mixer.q_proj.weight": (64, 48),
        "layers.0.mixer.k_proj.weight": (32, 48),
        "layers.0.mixer.v_proj.weight": (32, 48),
        "layers.0.mixer.o_proj.weight": (48, 64),
        "layers.2.norm.weight": (48,),
        "layers.2.mixer.up_proj.weight": (64, 48),
        "layers.2.mixer.down_proj.weight": (48, 64),
        "layers.2.final_layernorm.weight": (48,),
    }
    mine = {n.removeprefix("mtp."): s for n, s in shapes.items() if n.startswith("mtp.")}
    assert {n: s for n, s in mine.items() if not n.startswith("layers.1.")} == head
    in_memory = {n: tuple(p.shape) for n, p in build("mtp-latent").named_parameters() if ".1.mixer.experts" in n}
    for prefix in ("backbone", "mtp"):
        assert in_memory[f"{prefix}.layers.1.mixer.experts.up_proj"] == (16, 64, 24)
        assert in_memory[f"{prefix}.layers.1.mixer.experts.down_proj"] == (16, 24, 64)


# the tensors of the published checkpoints, and how many correction biases are float32 in a bfloat16 model
@pytest.mark.parametrize(
    ("preset", "count", "biases"),
    [
        ("nemotron-3-nano-4b", 263, 0),
        ("nemotron-3-nano-30b", 6_243, 23),
        ("nemotron-3.5-lightning-30b", 6_513, 24),
        ("nemotron-3-super-120b", 42_683, 41),
        ("nemotron-3-ultra-550b", 51_023, 49),
    ],
)
def test_tensor_counts(preset, count, biases):
    model = NemotronHForCausalLM(NemotronHConfig.preset(preset), device="meta", dtype=torch.bfloat16)
    assert len(checkpoint._places(model)) == count
    float32 = Counter(name.split(".")[-1] for name, p in model.named_parameters() if p.dtype == torch.float32)
    mamba = model.config.hybrid_override_pattern.count("M")
    expected = dict(A_log=mamba, D=mamba, dt_bias=mamba, e_score_correction_bias=biases)
    assert float32 == {name: number for name, number in expected.items() if number}


@pytest.mark.parametrize("rename", [lambda n: n, lambda n: n.replace("backbone.", "model."), "language_model.".__add__])
def test_merged_experts(model, folder, rename):
    rewrite(folder, lambda tensors: {rename(name): tensor for name, tensor in merge(tensors).items()})
    assert_equal(NemotronHForCausalLM.from_pretrained(folder), model)


def test_merged_in_one_layer_only(model, folder):
    def change(tensors):
        merged = merge(tensors)
        here = {name: t for name, t in merged.items() if name.startswith("mtp.")}
        return here | {name: t for name, t in tensors.items() if not name.startswith("mtp.")}

    rewrite(folder, change)
    assert_equal(NemotronHForCausalLM.from_pretrained(folder), model)


def test_dtypes(model, folder):
    """The correction bias is float32 in a model of any dtype, and is what the file has."""
    for dtype in (torch.bfloat16, torch.float16):
        loaded = NemotronHForCausalLM.from_pretrained(folder, dtype=dtype)
        for name, parameter in loaded.named_parameters():
            own = name.endswith(("e_score_correction_bias", "A_log", ".D", "dt_bias"))
            assert parameter.dtype == (torch.float32 if own else dtype), name
            assert parameter.equal(model.state_dict()[name].to(parameter.dtype)), name
        loaded.save_pretrained(folder / "again")
        assert_equal(NemotronHForCausalLM.from_pretrained(folder / "again"), loaded)
    assert NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float64).dtype == torch.float64


def test_without_the_head(model, folder):
    config = NemotronHConfig.from_pretrained(folder, num_nextn_predict_layers=0)
    loaded = NemotronHForCausalLM.from_pretrained(folder, config=config)
    assert loaded.mtp is None
    ids = torch.arange(10)[None]
    assert loaded(ids).equal(model(ids))


def test_every_problem_is_named(model, folder):
    layer = "backbone.layers.1.mixer."

    def change(tensors):
        for e in (0, 1, 2, 5, 15):
            del tensors[f"{layer}experts.{e}.up_proj.weight"]
        del tensors["mtp.layers.0.enorm.weight"]
        del tensors["mtp.layers.1.mixer.experts.7.down_proj.weight"]
        for e in range(16):
            tensors[f"{layer}experts.{e}.down_proj.weight"] = torch.ones(24, 63)
        tensors[f"{layer}gate.e_score_correction_bias"] = torch.ones(15)
        tensors[f"{layer}experts.16.up_proj.weight"] = torch.ones(64, 24)
        tensors[f"{layer}experts.17.up_proj.weight"] = torch.ones(64, 24)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        NemotronHForCausalLM.from_pretrained(folder)
    message = str(error.value)
    assert (
        f"7 missing:\n    {layer}experts.{{0-2,5,15}}.up_proj.weight\n"
        "    mtp.layers.0.enorm.weight\n    mtp.layers.1.mixer.experts.7.down_proj.weight\n"
    ) in message
    assert f"2 surplus:\n    {layer}experts.{{16-17}}.up_proj.weight in model.safetensors" in message
    assert f"{layer}experts.{{0-15}}.down_proj.weight in model.safetensors: expected (24, 64), got (24, 63)" in message
    assert f"{layer}gate.e_score_correction_bias in model.safetensors: expected (16,), got (15,)" in message


def test_one_layer_both_ways(folder):
    """Both arrangements of the same experts: one is surplus."""
    rewrite(folder, lambda tensors: tensors | merge(tensors))
    with pytest.raises(CheckpointError, match=r"surplus:\n    .*experts\.\{0-15\}\.down_proj\.weight in model"):
        NemotronHForCausalLM.from_pretrained(folder)


LOAD = r"""
import re, sys
from hybrid_ops.models import NemotronHConfig, NemotronHForCausalLM

def memory(field):
    return int(re.search(field + r":\s*(\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

NemotronHForCausalLM.from_pretrained(sys.argv[1])  # a small one, for what only the first load brings into memory
before = memory("VmRSS")
model = NemotronHForCausalLM.from_pretrained(sys.argv[2])
print(memory("VmHWM") - before, model.dtype)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory(folder, tmp_path):
    """Loading takes the model and one shard, not a second copy of the experts."""
    values = NAMES["moe"] | COMMON | dict(hybrid_override_pattern="EEEE", moe_intermediate_size=2560)
    model = NemotronHForCausalLM(NemotronHConfig(**values | dict(n_routed_experts=32)))
    size, shard = sum(p.numel() * p.element_size() for p in model.parameters()), 8 * 2**20
    assert size > 100 * 2**20
    model.save_pretrained(tmp_path / "big", max_shard_bytes=shard)
    del model
    command = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "big")]
    peak, dtype = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert dtype == "torch.float32"
    assert size * 0.9 < int(peak) < size + shard + 16 * 2**20  # allocator and Python


def test_experts_are_read_one_by_one(folder, monkeypatch):
    """No tensor that is read holds more than one expert."""
    largest, read = {}, checkpoint._read

    def watched(entries):
        for name, tensor in read(entries):
            if ".experts." in name:
                largest[name] = tensor.numel()
            yield name, tensor

    monkeypatch.setattr(checkpoint, "_read", watched)
    NemotronHForCausalLM.from_pretrained(folder)
    assert len(largest) == 3 * 2 * 16
    assert set(largest.values()) == {64 * 24}


def test_lists_of_layers(folder):
    """transformers 5 names the layers of the head in a list too."""
    expected = NemotronHConfig.from_pretrained(folder)
    edit_config(
        folder,
        hybrid_override_pattern=...,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        mtp_hybrid_override_pattern=...,
        mtp_layers_block_type=["full_attention", "moe", "mlp"],
        n_routed_experts=...,
        num_local_experts=16,
    )
    assert NemotronHConfig.from_pretrained(folder) == expected


def test_puzzle(tmp_path):
    """Layers with values of their own: what is written, and what is read where it alone names the layers."""
    config = NemotronHConfig(**NAMES["puzzle"] | COMMON)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "nemotron_h_puzzle"
    assert values["architectures"] == ["NemotronHPuzzleForCausalLM"]
    assert [block["block_type"] for block in values["block_configs"]] == ["mamba", "moe", "moe", "attention"]
    edit_config(
        tmp_path,
        hybrid_override_pattern=...,
        num_hidden_layers=...,
        mtp_hybrid_override_pattern=...,
        moe_intermediate_size=...,
    )
    again = NemotronHConfig.from_pretrained(tmp_path, moe_intermediate_size=config.moe_intermediate_size)
    assert again == config
    assert again.for_layer(1).moe_intermediate_size == 40
    assert (again.for_layer(2).n_routed_experts, again.for_layer(2).moe_latent_size) == (6, 24)
    assert again.for_layer(1, mtp=True).num_experts_per_tok == 4
    assert NemotronHConfig.preset("tiny-moe").for_layer(1) == NemotronHConfig.preset("tiny-moe")


def test_puzzle_state_sizes():
    """A Mamba-2 layer's state size may be its own: parameters and cache have it."""
    values = NAMES["puzzle"] | COMMON | dict(hybrid_override_pattern="MM", num_nextn_predict_layers=0)
    values |= dict(block_configs=({}, dict(ssm_state_size=24)), mtp_block_configs=None)
    model = redraw(NemotronHForCausalLM(NemotronHConfig(**values), dtype=torch.float64)).requires_grad_(False)
    cache, ids = model.new_cache(1), torch.arange(9)[None]
    assert [state.shape[-1] for state in cache.ssm_states] == [16, 24]
    got = torch.cat([model(piece, cache=cache) for piece in ids.split([7, 1, 1], dim=1)], dim=1)
    torch.testing.assert_close(got, model(ids), rtol=1e-9, atol=1e-9)  # float64 throughout; float32 is off by 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_routed_experts=0), "n_routed_experts must be a positive integer, got 0"),
        (dict(moe_latent_size=0), "moe_latent_size must be a positive integer, got 0"),
        (dict(moe_intermediate_size="big"), "moe_intermediate_size must be a positive integer, got 'big'"),
        (dict(num_experts_per_tok=17), "num_experts_per_tok must be at most the 16 experts of 1 groups, got 17"),
        (dict(n_group=3), "n_group must divide n_routed_experts=16, got 3"),
        (dict(n_group=2, topk_group=3), "topk_group must be at most n_group=2, got 3"),
        (dict(n_group=8, topk_group=2), "num_experts_per_tok must be at most the 4 experts of 2 groups, got 5"),
        (dict(n_shared_experts=2), "n_shared_experts must be 1, got 2"),
        (dict(mlp_bias=True), "mlp_bias must be False in a model with experts, got True"),
        (dict(num_nextn_predict_layers=2), "num_nextn_predict_layers must be 0 or 1, .* got 2"),
        (dict(mtp_hybrid_override_pattern="M"), r"mtp_hybrid_override_pattern must consist of '\*', '-', 'E', got 'M'"),
        (dict(mtp_hybrid_override_pattern=""), "mtp_hybrid_override_pattern must name at least one layer"),
        (dict(mtp_layers_block_type=["moe"]), "mtp_hybrid_override_pattern and mtp_layers_block_type must agree"),
        (dict(block_configs=[{}]), "block_configs must consist of .*, got None"),
        (dict(block_configs=["moe"]), "hybrid_override_pattern and block_configs must agree"),
        (dict(block_configs=["mamba", "moe", "attention", "moe"]), "block_configs must be a list of objects"),
    ],
)
def test_bad_configurations(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        NemotronHConfig.from_pretrained(folder)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (({},), "block_configs must have an entry for each of the 4 layers, got 1"),
        (({}, dict(hidden_size=3), {}, {}), r"block_configs\[1\], .*, may set n_routed_experts, .*, got hidden_size"),
        (({}, {}, {}, dict(head_dim=3)), r"block_configs\[3\], .*, may set nothing, got head_dim"),
        (({}, dict(block_type="mlp"), {}, {}), r"block_configs\[1\] must be of the pattern's type, 'moe', got 'mlp'"),
        (({}, dict(num_experts_per_tok=9), {}, {}), r"block_configs\[1\]: num_experts_per_tok must be at most the 8"),
    ],
)
def test_bad_blocks(blocks, message):
    with pytest.raises(ValueError, match=message):
        NemotronHConfig(**NAMES["puzzle"] | COMMON | dict(block_configs=blocks))


def test_experts_in_a_folder_of_transformers(tmp_path):
    """transformers writes the published names, and reads them."""
    transformers = pytest.importorskip("transformers", minversion="5.17")
    values = NAMES["moe-latent"] | COMMON
    theirs = redraw(transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**values)))
    theirs.save_pretrained(tmp_path / "theirs")
    assert any("experts.3.up_proj.weight" in name for name in load_file(tmp_path / "theirs" / "model.safetensors"))
    ours = NemotronHForCausalLM.from_pretrained(tmp_path / "theirs")
    assert dataclasses.replace(ours.config, dtype=None, max_position_embeddings=None) == NemotronHConfig(**values)
    ours.save_pretrained(tmp_path / "ours")
    again, report = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = theirs.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert all(tensor.equal(expected[name]) for name, tensor in again.state_dict().items())
    assert math.isfinite(sum(t.sum().item() for t in expected.values()))
