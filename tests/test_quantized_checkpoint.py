"""Reading and writing folders with FP8 and NVFP4 weights: names, formats, metadata, and whatever is wrong with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_ops.models import CheckpointError, NemotronHConfig, NemotronHForCausalLM, checkpoint
from hybrid_ops.nn import Fp8Linear, Fp8Weight, Nvfp4Linear, Nvfp4Weight

from .quantized_folders import (
    SIZES,
    all_fp8,
    all_nvfp4,
    as_super,
    build,
    declare,
    declared,
    dequantized,
    store,
    write,
    write_dequantized,
)
from .random_models import COMMON, CONFIGS
from .test_checkpoint import rewrite

LAYER = "backbone.layers.1.mixer."
LINEAR = "backbone.layers.0.mixer.in_proj."
FORMS = [all_nvfp4, all_fp8, as_super, lambda name: "fp8-row"]


def but_the_head(name):
    return None if name.startswith("mtp.") else "nvfp4"


@pytest.fixture(scope="module")
def model():
    return build()


def same(a, b):
    return a.dtype == b.dtype and a.view(torch.uint8).equal(b.view(torch.uint8)) if a.dim() else a.equal(b)


def expected_state(tensors):
    """The tensors of a folder as the model has them: those of the experts of a layer in one."""
    state = {}
    for name, tensor in tensors.items():
        before, dot, behind = name.partition(".experts.")
        number, _, own = behind.partition(".")
        if dot:
            state.setdefault(f"{before}.experts.{own}", {})[int(number)] = tensor
        else:
            state[name] = tensor
    for name, tensor in state.items():
        if isinstance(tensor, dict):
            state[name] = torch.stack([tensor[e] for e in range(len(tensor))])
    quantized = (torch.uint8, torch.float8_e4m3fn)
    plain = [n for n, t in state.items() if ".experts." in n and n.endswith(".weight") and t.dtype not in quantized]
    return {name.removesuffix(".weight") if name in plain else name: tensor for name, tensor in state.items()}


def assert_state(model, tensors):
    state, expected = model.state_dict(), expected_state(tensors)
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert same(tensor, expected[name]), name


@pytest.mark.parametrize("input_scale", [None, 0.25])
@pytest.mark.parametrize("form_of", FORMS)
def test_stays_what_it_is_on_disk(model, form_of, input_scale, tmp_path):
    tensors = write(model, tmp_path, form_of, input_scale)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert_state(loaded, tensors)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(module.load.any() for module in loaded.modules() if hasattr(module, "load"))


def test_modules(model, tmp_path):
    write(model, tmp_path, as_super, input_scale=0.5)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    mamba, moe, attention = (loaded.backbone.layers[i].mixer for i in range(3))
    assert isinstance(mamba.in_proj, Fp8Linear)
    assert isinstance(moe.shared_experts.up_proj, Fp8Linear)
    assert isinstance(moe.experts.up_proj, Nvfp4Weight)
    assert type(attention.q_proj) is torch.nn.Linear
    assert moe.experts.up_proj.weight_scale_2.shape == moe.experts.up_proj.input_scale.shape == (8,)
    write(model, tmp_path, lambda name: "fp8" if "up_proj" in name else "nvfp4")
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    experts = loaded.backbone.layers[1].mixer.experts
    assert isinstance(experts.up_proj, Fp8Weight)
    assert isinstance(experts.down_proj, Nvfp4Weight)
    assert isinstance(loaded.lm_head, Nvfp4Linear)
    assert (loaded.dtype, loaded.device) == (torch.float32, torch.device("cpu"))


def test_experts_are_read_one_by_one(model, tmp_path, monkeypatch):
    write(model, tmp_path, all_nvfp4)
    largest, read = 0, checkpoint._read

    def watched(entries):
        nonlocal largest
        for name, tensor in read(entries):
            largest = max(largest, tensor.numel() if ".experts." in name else 0)
            yield name, tensor

    monkeypatch.setattr(checkpoint, "_read", watched)
    NemotronHForCausalLM.from_pretrained(tmp_path)
    assert largest == 64 * 32 // 2


LOAD = r"""
import re, sys
from hybrid_ops.models import NemotronHForCausalLM

def memory(field):
    return int(re.search(field + r":\s*(\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

load = lambda folder: NemotronHForCausalLM.from_pretrained(folder, dequantize=sys.argv[3] == "True")
load(sys.argv[1])  # a small one, for what only the first load brings into memory
before = memory("VmRSS")
model = load(sys.argv[2])
print(memory("VmHWM") - before, sum(t.numel() * t.element_size() for t in model.state_dict().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("dequantize", [False, True])
def test_memory(model, dequantize, tmp_path):
    """The model and one shard; where it is dequantised, the larger one and a layer."""
    write(model, tmp_path / "small", all_nvfp4)
    values = SIZES | COMMON | dict(hybrid_override_pattern="EEEE", moe_intermediate_size=4096, n_routed_experts=32)
    big = NemotronHForCausalLM(NemotronHConfig(**values | dict(num_nextn_predict_layers=0)), device="meta")
    for layer in big.backbone.layers:
        experts = layer.mixer.experts
        for name, matrices in list(experts.named_parameters()):
            delattr(experts, name)
            setattr(experts, name, Nvfp4Weight(matrices.shape, device="meta"))
    big.to_empty(device="cpu").save_pretrained(tmp_path / "big", max_shard_bytes=2**22)
    del big
    command = [sys.executable, "-c", LOAD, *map(str, (tmp_path / "small", tmp_path / "big", dequantize))]
    peak, size = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert size > (100 if dequantize else 15) * 2**20
    assert size * 0.9 < peak < size + 2**22 + 16 * 2**20 + (size / 8 if dequantize else 0)  # allocator and Python


def as_compressed(tensors):
    """The names of compressed-tensors, its reciprocal global scales, and scalars as (1,)."""
    renamed = {}
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        nvfp4 = f"{module}.weight_scale_2" in tensors
        if own == "weight_scale_2":
            renamed[f"{module}.weight_global_scale"] = 1 / tensor.reshape(1)
        elif own == "input_scale" and nvfp4:
            renamed[f"{module}.input_global_scale"] = 1 / tensor.reshape(1)
        elif own == "weight" and nvfp4:
            renamed[f"{module}.weight_packed"] = tensor
        elif own == "weight_scale" and not nvfp4:
            renamed[name] = tensor.reshape(-1, 1) if tensor.numel() > 1 else tensor.reshape(1)
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("form_of", FORMS)
def test_names_of_compressed_tensors(model, form_of, tmp_path):
    tensors = write(model, tmp_path, form_of, input_scale=0.3)
    rewrite(tmp_path, as_compressed)
    weights = dict(type="float", num_bits=4, strategy="tensor_group", group_size=16)
    fp8 = dict(type="float", num_bits=8, strategy="channel")
    groups = {"group_0": dict(weights=weights), "group_1": dict(weights=fp8), "group_2": dict(weights=None)}
    declare(tmp_path, dict(quant_method="compressed-tensors", config_groups=groups))
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in expected_state(tensors).items():
        if name.endswith(("weight_scale_2", "input_scale")):  # two divisions
            torch.testing.assert_close(loaded[name], tensor, rtol=2**-22, atol=0)
        else:
            assert same(loaded[name], tensor), name


def test_scales_of_rows_in_the_dtype_of_the_model(model, tmp_path):
    """llm-compressor stores them in bfloat16."""
    tensors = write(model, tmp_path, lambda name: "fp8-row")
    rewrite(tmp_path, lambda tensors: {n: t.bfloat16() if "scale" in n else t for n, t in tensors.items()})
    scale = NemotronHForCausalLM.from_pretrained(tmp_path).state_dict()[f"{LINEAR}weight_scale"]
    assert scale.dtype == torch.float32
    assert scale.equal(tensors[f"{LINEAR}weight_scale"].flatten().bfloat16().float())


@pytest.mark.parametrize("names", [("k_proj.k_scale", "v_proj.v_scale"), ("k_scale", "v_scale")])
def test_scales_of_the_kv_cache_are_left_out(model, names, tmp_path):
    tensors = write(model, tmp_path, all_nvfp4)
    extra = {f"backbone.layers.2.mixer.{name}": torch.tensor(0.1) for name in names}
    rewrite(tmp_path, lambda tensors: tensors | extra)
    assert_state(NemotronHForCausalLM.from_pretrained(tmp_path), tensors)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("form_of", FORMS)
def test_round_trip(model, form_of, shard_bytes, tmp_path):
    tensors = write(model, tmp_path / "first", form_of, input_scale=0.25)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second", max_shard_bytes=shard_bytes)
    written = {n: t for path in (tmp_path / "second").glob("*.safetensors") for n, t in load_file(path).items()}
    assert written.keys() == tensors.keys()
    assert all(same(written[name], tensor) for name, tensor in tensors.items())
    again = NemotronHForCausalLM.from_pretrained(tmp_path / "second")
    assert again.config == model.config
    assert_state(again, tensors)


CONV, GATE, HEAD_GATE = "backbone.layers.0.mixer.conv1d", f"{LAYER}gate", "mtp.layers.1.mixer.gate"


@pytest.mark.parametrize(
    ("form_of", "input_scale", "algorithm", "kept"),
    [
        (all_nvfp4, 0.5, "NVFP4", [CONV, GATE, HEAD_GATE]),
        (all_nvfp4, None, "W4A16_NVFP4", [CONV, GATE, HEAD_GATE]),
        (all_fp8, 0.5, "FP8", [CONV, GATE, HEAD_GATE]),
        (lambda name: "fp8-row", None, "FP8_PER_CHANNEL_PER_TOKEN", [CONV, GATE, HEAD_GATE]),
        (but_the_head, None, "W4A16_NVFP4", [CONV, GATE, "mtp*"]),
        (
            lambda name: None if f"{LAYER}experts" in name else "fp8",
            None,
            "FP8",
            [CONV, f"{LAYER}experts*", GATE, HEAD_GATE],
        ),
        (
            lambda name: None if f"{LAYER}experts" in name and "up" in name else "fp8",
            None,
            "FP8",
            [CONV, *(f"{LAYER}experts.{expert}.up_proj" for expert in range(8)), GATE, HEAD_GATE],
        ),
    ],
)
def test_metadata_of_one_format(model, form_of, input_scale, algorithm, kept, tmp_path):
    """What is written says what ModelOpt says, and goes with the tensors."""
    write(model, tmp_path, form_of, input_scale)
    NemotronHForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    said = declared(tmp_path / "again")
    assert said["quant_algo"] == algorithm
    assert said["exclude_modules"] == kept


def test_metadata_of_mixed_formats(model, tmp_path):
    def form_of(name):
        return "fp8-row" if "o_proj" in name else as_super(name)

    write(model, tmp_path, form_of, input_scale=0.5)
    rewrite(tmp_path, lambda tensors: tensors | store("lm_head.weight", tensors["lm_head.weight"], "nvfp4"))
    NemotronHForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    said = declared(tmp_path / "again")
    assert said["quant_algo"] == "MIXED_PRECISION"
    layers = said["quantized_layers"]
    assert layers[f"{LAYER}experts.7.up_proj"] == dict(quant_algo="NVFP4", group_size=16)
    assert layers["lm_head"] == dict(quant_algo="W4A16_NVFP4", group_size=16)
    assert layers[LINEAR[:-1]] == dict(quant_algo="FP8")
    assert layers["mtp.layers.0.mixer.o_proj"] == dict(quant_algo="FP8_PER_CHANNEL_PER_TOKEN")
    assert len(layers) == 2 + 1 + 2 * (2 * 8 + 2 + 1)
    assert {f"{LAYER}fc1_latent_proj", "mtp.layers.0.eh_proj"} < set(said["exclude_modules"])


def test_metadata_of_an_earlier_save(model, tmp_path):
    write(model, tmp_path / "quantized", all_fp8)
    NemotronHForCausalLM.from_pretrained(tmp_path / "quantized").save_pretrained(tmp_path / "out")
    declared(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form_of", FORMS)
def test_dequantize(model, form_of, dtype, tmp_path):
    tensors = write(model, tmp_path / "quantized", form_of, input_scale=0.25)
    write_dequantized(model, tensors, tmp_path / "plain")
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "quantized", dequantize=True, dtype=dtype)
    plain = NemotronHForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    state, expected = dict(loaded.named_parameters()), dict(plain.named_parameters())
    assert state.keys() == expected.keys()
    for name, parameter in state.items():
        assert same(parameter.detach(), expected[name].detach()), name
        assert parameter.requires_grad == expected[name].requires_grad
    loaded(torch.arange(5)[None]).sum().backward()
    assert loaded.backbone.layers[1].mixer.experts.up_proj.grad.abs().max() > 0


@pytest.mark.parametrize("form_of", [all_nvfp4, as_super])
def test_dtypes(model, form_of, tmp_path):
    """`dtype` and casts are for what is not quantised."""
    tensors = expected_state(write(model, tmp_path, form_of))
    quantized = {name for name in tensors if name.endswith(("_scale", "_scale_2"))}
    quantized |= {name.removesuffix("_scale") for name in quantized}
    assert quantized & tensors.keys()
    for dtype, cast in (
        (torch.float16, torch.nn.Module.eval),
        (None, torch.nn.Module.half),
        (None, torch.nn.Module.bfloat16),
    ):
        loaded = cast(NemotronHForCausalLM.from_pretrained(tmp_path, dtype=dtype))
        for name, tensor in loaded.state_dict().items():
            if name in quantized:
                assert same(tensor, tensors[name]), name
        assert loaded.backbone.embeddings.weight.dtype != torch.float32
        assert loaded.new_cache(1).layers[0].conv.dtype == loaded.dtype
    with pytest.raises(
        ValueError, match="dtype must be float32, bfloat16 or float16 for a quantised model, got float64"
    ):
        NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)


def test_biases(tmp_path):
    """A layer with a bias keeps it, in the dtype of the model."""
    values = CONFIGS["biases"] | dict(hidden_size=48, intermediate_size=64, head_dim=16, num_nextn_predict_layers=0)
    model = build(**values)
    tensors = write(model, tmp_path, lambda name: "fp8" if "in_proj" in name else "nvfp4")
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.backbone.layers[2].mixer.up_proj.bias.equal(
        tensors["backbone.layers.2.mixer.up_proj.bias"].bfloat16()
    )


KNOWN = [
    dict(
        quant_method="modelopt", quant_algo="NVFP4", kv_cache_scheme=dict(num_bits=8), group_size=16, ignore=["lm_head"]
    ),
    dict(quant_method="modelopt_fp4", quant_algo="W4A16_NVFP4"),
    dict(quant_algo="MIXED_PRECISION", quantized_layers={LINEAR[:-1]: dict(quant_algo="FP8")}),
    dict(quant_algo=None, kv_cache_quant_algo="FP8"),
    None,
]
UNKNOWN = [
    (dict(quant_method="gptq", bits=4), "quant_method must be 'modelopt' or 'compressed-tensors', got 'gptq'"),
    (dict(quant_method="fp8", weight_block_size=[128, 128]), "quant_method must be .* got 'fp8'"),
    (dict(quant_method="modelopt", quant_algo="W4A8_AWQ"), "quant_algo must be one of FP8, .*, got 'W4A8_AWQ'"),
    (dict(quant_algo="INT4_AWQ"), "quant_algo must be one of FP8, .*, got 'INT4_AWQ'"),
    (dict(quant_algo="FP8_PB_WO"), "quant_algo must be one of FP8, .*, got 'FP8_PB_WO'"),
    (dict(quant_algo="NVFP4_AWQ"), "quant_algo must be one of FP8, .*, got 'NVFP4_AWQ'"),
    (dict(quant_algo="NVFP4", group_size=32), "group_size must be 16, got 32"),
    (
        dict(quant_algo="MIXED_PRECISION", quantized_layers={"lm_head": dict(quant_algo="W8A16")}),
        "quant_algo of lm_head must be one of FP8, .*, got 'W8A16'",
    ),
    ("NVFP4", "must be an object, got 'NVFP4'"),
]
GROUPS = [
    dict(type="int", num_bits=8, strategy="channel"),
    dict(type="int", num_bits=4, strategy="group", group_size=128),
    dict(type="float", num_bits=8, strategy="block", block_structure=[128, 128]),
    dict(type="float", num_bits=4, strategy="tensor_group", group_size=32),
]


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("said", KNOWN)
def test_known_metadata(model, file, said, tmp_path):
    tensors = write(model, tmp_path, as_super)
    say(tmp_path, file, said)
    assert NemotronHConfig.from_pretrained(tmp_path) == model.config
    assert_state(NemotronHForCausalLM.from_pretrained(tmp_path), tensors)


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize(
    ("said", "message"),
    UNKNOWN
    + [
        (
            dict(quant_method="compressed-tensors", config_groups=dict(group_0=dict(weights=weights))),
            "weights of group_0",
        )
        for weights in GROUPS
    ],
)
def test_unknown_metadata(model, file, said, message, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    say(tmp_path, file, said)
    monkeypatch.setattr(checkpoint, "_entries", None)  # refused before any header is read
    with pytest.raises(CheckpointError, match=message) as error:
        NemotronHForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path / file) in str(error.value)


def say(folder, file, said):
    if file == "config.json":
        declare(folder, said)
    else:
        (folder / file).write_text(json.dumps(dict(producer=dict(name="modelopt"), quantization=said)))


EXPERT = f"{LAYER}experts.3.up_proj."


def drop(*names):
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def put(name, tensor):
    return lambda tensors: tensors | {name: tensor}


@pytest.mark.parametrize(
    ("form_of", "change", "message"),
    [
        (all_nvfp4, drop(f"{LINEAR}weight_scale_2"), f"1 missing:\n    {LINEAR}weight_scale_2"),
        (all_nvfp4, drop(f"{LINEAR}weight_scale"), f"1 missing:\n    {LINEAR}weight_scale"),
        (all_nvfp4, drop(f"{EXPERT}weight_scale_2"), f"1 missing:\n    {EXPERT}weight_scale_2"),
        (all_fp8, drop(f"{EXPERT}weight_scale"), f"1 missing:\n    {EXPERT}weight_scale"),
        (all_fp8, drop(f"{EXPERT}weight"), f"1 missing:\n    {EXPERT}weight"),
        (
            all_nvfp4,
            put(f"{EXPERT}input_scale", torch.tensor(1.0)),
            f"7 missing:\n    {LAYER}experts.{{0-2,4-7}}.up_proj.input_scale",
        ),
        (
            all_nvfp4,
            put(f"{LINEAR}weight_scale", torch.ones(196, 4).to(torch.float8_e4m3fn)),
            f"{LINEAR}weight_scale in model.safetensors: expected (196, 3), got (196, 4)",
        ),
        (
            all_nvfp4,
            put(f"{LINEAR}weight_scale", torch.ones(1024).to(torch.float8_e4m3fn)),
            f"{LINEAR}weight_scale in model.safetensors: expected (196, 3), got (1024,)",
        ),
        (
            all_nvfp4,
            put(f"{LINEAR}weight_scale", torch.ones(196, 3)),
            f"{LINEAR}weight_scale in model.safetensors: expected F8_E4M3, got F32",
        ),
        (
            all_nvfp4,
            put(f"{LINEAR}weight_scale_2", torch.ones(2)),
            f"{LINEAR}weight_scale_2 in model.safetensors: expected (), got (2,)",
        ),
        (
            all_nvfp4,
            put(f"{LINEAR}weight", torch.zeros(196, 48, dtype=torch.uint8)),
            f"{LINEAR}weight in model.safetensors: expected (196, 24), got (196, 48)",
        ),
        (
            all_fp8,
            put(f"{LINEAR}weight_scale", torch.ones(2, 1)),
            f"{LINEAR}weight_scale in model.safetensors: expected (), got (2, 1)",
        ),
        (
            all_fp8,
            put(f"{EXPERT}weight_scale", torch.ones(64, 1)),
            f"{EXPERT}weight_scale in model.safetensors: expected (), got (64, 1)",
        ),
        (
            all_fp8,
            put(f"{LINEAR}weight", torch.zeros(196, 48, dtype=torch.int8)),
            f"{LINEAR}weight in model.safetensors: expected F64, F32, F16, BF16, got I8",
        ),
        (
            all_fp8,
            put(f"{LINEAR}weight", torch.zeros(196, 48)),
            f"1 surplus:\n    {LINEAR}weight_scale in model.safetensors",
        ),
        (
            all_fp8,
            put(f"{LINEAR}weight_zero_point", torch.zeros(1)),
            f"1 surplus:\n    {LINEAR}weight_zero_point in model.safetensors",
        ),
        (
            all_fp8,
            put("backbone.norm_f.weight", torch.zeros(48).to(torch.float8_e4m3fn)),
            "backbone.norm_f.weight in model.safetensors: expected F64, F32, F16, BF16, got F8_E4M3",
        ),
        (
            all_fp8,
            put(f"{EXPERT}weight", torch.zeros(64, 16, dtype=torch.uint8)),
            f"the experts of a layer must have one format, got F8_E4M3 for {LAYER}experts.7.up_proj.weight, "
            f"U8 for {EXPERT}weight",
        ),
        (
            all_fp8,
            put(f"{LINEAR}weight_packed", torch.zeros(196, 24, dtype=torch.uint8)),
            f"{LINEAR}weight must be there once",
        ),
    ],
)
def test_contradictory_tensors(model, form_of, change, message, tmp_path, monkeypatch):
    write(model, tmp_path, form_of)
    rewrite(tmp_path, change)
    monkeypatch.setattr(checkpoint, "_read", None)  # refused before any tensor is read
    with pytest.raises(CheckpointError) as error:
        NemotronHForCausalLM.from_pretrained(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_too_narrow_for_nvfp4(tmp_path):
    """24 latent features: such a layer cannot have been quantised in blocks of 16."""
    model = build(moe_latent_size=24)
    tensors = write(model, tmp_path, lambda name: None)
    for e in range(8):
        name = f"{LAYER}experts.{e}.up_proj.weight"
        tensors |= store(name, torch.ones(64, 32), "nvfp4") | {name: torch.zeros(64, 12, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj\.weight must have K divisible by 16 .* got K = 24"):
        NemotronHForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"shape must have K divisible by 16 for NVFP4, got \(64, 24\)"):
        Nvfp4Weight((64, 24))


def test_a_quantised_model_is_not_drawn_anew(model, tmp_path):
    tensors = write(model, tmp_path, as_super)
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"backbone.layers.0.mixer.in_proj must be a parameter .* got Fp8Linear"):
        loaded.reset_parameters()
    assert_state(loaded, tensors)


def test_helpers(model, tmp_path):
    """The oracle of these tests: what is written is near what the model has."""
    tensors = write(model, tmp_path, all_nvfp4)
    plain, original = dequantized(tensors), model.state_dict()
    assert plain.keys() == checkpoint._places(model).keys()
    error = (plain[f"{LINEAR}weight"] - original[f"{LINEAR}weight"]).square().mean().sqrt()
    assert 0 < error < 0.15 * original[f"{LINEAR}weight"].square().mean().sqrt()  # E2M1 rounds by about 10 % in RMS
