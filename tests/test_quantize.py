"""Quantised copies of checkpoints: bytes, rules, metadata, memory, errors, and the command."""

import dataclasses
import json
import math
import os
import re
import weakref

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import hybrid_ops
from hybrid_ops.models import CheckpointError, NemotronHConfig, NemotronHForCausalLM, checkpoint, quantize_checkpoint
from hybrid_ops.models.quantize_matrices import Quantizer, _Reader
from hybrid_ops.models.quantize_rules import formats

from .quantized_folders import declared, read, stored_format
from .random_models import COMMON, CONFIGS, MTP_CONFIGS, redraw
from .test_checkpoint import edit_config, rewrite
from .test_moe_checkpoint import merge

# each kind of layer, latent experts, a head that drafts; every K a multiple of 16
SUPER = CONFIGS["moe-latent"] | dict(
    hybrid_override_pattern="ME*-M",
    moe_latent_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)
DENSE = CONFIGS["twelve-heads-per-group"]  # "MM*-"


def save(folder, values, **options):
    model = redraw(NemotronHForCausalLM(NemotronHConfig(**values | COMMON), dtype=torch.bfloat16))
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("super"), SUPER)


@pytest.fixture
def folder(tmp_path):
    """One that a test may change."""
    return save(tmp_path / "in", SUPER)


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.view(-1).view(torch.uint8).equal(theirs[name].view(-1).view(torch.uint8)), name


def decode(tensors, module):
    """float64 values of a stored matrix, by the definition of the formats and NumPy alone."""
    weight = tensors[f"{module}.weight"]
    scale = e4m3(tensors[f"{module}.weight_scale"])
    if weight.dtype == torch.float8_e4m3fn:
        return e4m3(weight) * scale
    bytes_ = weight.numpy()
    codes = np.stack([bytes_ % 16, bytes_ // 16], -1).reshape(bytes_.shape[0], -1)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes % 8] * np.where(codes < 8, 1, -1)
    return values * np.repeat(scale, 16, axis=1) * float(tensors[f"{module}.weight_scale_2"])


def e4m3(tensor):
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor.double().numpy()
    codes = tensor.view(torch.uint8).numpy().astype(int)
    exponent, mantissa = codes // 8 % 16, codes % 8
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.where(codes < 128, magnitude, -magnitude)


def error(tensors, source, modules):
    """||W - W'|| / ||W|| of several matrices together."""
    weights = [source[f"{module}.weight"].double().numpy() for module in modules]
    square = sum(np.sum((w - decode(tensors, m)) ** 2) for w, m in zip(weights, modules, strict=True))
    return math.sqrt(square / sum(np.sum(w**2) for w in weights))


@pytest.mark.parametrize(("format", "four_over_six"), [("nvfp4", None), ("nvfp4", "mse"), ("fp8", None)])
def test_bytes(source, tmp_path, format, four_over_six):
    """What is on disk are the quantisers' bytes, which stand for the source; the rest is the source's own."""
    quantize_checkpoint(source, tmp_path, format=format, four_over_six=four_over_six)
    tensors, before = read(tmp_path), read(source)
    seen, names = set(), set()
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        seen.add(kind := stored_format(tensors, module))
        if kind == "keep":
            assert tensors[name].equal(weight)
            assert tensors[name].dtype == weight.dtype
            names.add(name)
            continue
        if kind == "nvfp4":
            q = hybrid_ops.nvfp4_quantize(weight, mode="modelopt", four_over_six=four_over_six)
            parts = {"weight": q.data, "weight_scale": q.scale, "weight_scale_2": q.tensor_scale}
            restored = hybrid_ops.nvfp4_dequantize(q, dtype=torch.float32)
            steps = weight.float().unflatten(1, (-1, 16)).abs().amax(2).repeat_interleave(16, 1) / 6
        else:
            q = hybrid_ops.fp8_quantize(weight, "tensor")
            parts = {"weight": q.data, "weight_scale": q.scale}
            restored = hybrid_ops.fp8_dequantize(q, dtype=torch.float32)
            steps = weight.float().abs().clamp(min=float(weight.abs().max()) * 2**-14) / 16  # 3 bits of mantissa
        assert_same({p: tensors[f"{module}.{p}"] for p in parts}, parts)
        names |= {f"{module}.{part}" for part in parts}
        np.testing.assert_allclose(decode(tensors, module), restored.double().numpy(), rtol=1e-6)
        # NVFP4: half of the widest gap, 4 to 6, is one step of a block scale, itself off by at most 1/16
        assert (restored - weight.float()).abs().le(steps * (1.07 if kind == "fp8" else 1.5)).all(), name
    assert seen == ({"nvfp4", "fp8", "keep"} if format == "nvfp4" else {"fp8", "keep"})
    assert tensors.keys() == names


def test_four_over_six_is_closer(source, tmp_path):
    rows = {}
    for choice in (None, "mse"):
        report = quantize_checkpoint(source, tmp_path / str(choice), four_over_six=choice)
        rows[choice] = {row.layer: row.error for row in report.rows if row.format == "nvfp4"}
    assert all(rows["mse"][layer] < rows[None][layer] for layer in rows[None])


NANO_KEPT = {4, 11, 18, 25, 32, 41}  # Mamba right before attention


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
@pytest.mark.parametrize(
    ("preset", "kept", "expected"),
    [
        ("nemotron-3-nano-30b", NANO_KEPT, dict(experts="nvfp4", shared_experts="nvfp4", mamba="nvfp4")),
        ("nemotron-3.5-lightning-30b", set(), dict(experts="nvfp4", shared_experts="nvfp4", mamba="fp8")),
        ("nemotron-3-super-120b", set(), dict(experts="nvfp4", shared_experts="fp8", mamba="fp8")),
        ("nemotron-3-ultra-550b", set(), dict(experts="nvfp4", shared_experts="fp8", mamba="fp8")),
        ("nemotron-nano-9b-v2", {13, 20, 29, 38}, dict(mlp="nvfp4", mamba="nvfp4")),
        ("nemotron-3-nano-4b", {11, 16, 23, 31}, dict(mlp="nvfp4", mamba="nvfp4")),
    ],
)
def test_recipes(preset, kept, expected, format):
    """Those of the published checkpoints; whatever is not named here stays as it is."""
    config = NemotronHConfig.preset(preset, n_routed_experts=4, num_experts_per_tok=2)
    names = checkpoint._places(NemotronHForCausalLM(config, device="meta"))
    chosen = formats([name.removesuffix(".weight") for name in names], config, format)
    of_leaf = dict(in_proj="mamba", out_proj="mamba", up_proj="mlp", down_proj="mlp")
    for module, got in chosen.items():
        match = re.fullmatch(r"backbone\.layers\.(\d+)\.mixer\.(?:(experts|shared_experts)\..*|(\w+))", module)
        kind = (match[2] or of_leaf.get(match[3])) if match else None
        wanted = "keep" if kind == "mamba" and int(match[1]) in kept else expected.get(kind, "keep")
        assert got == ("fp8" if format == "fp8" and wanted != "keep" else wanted), module
    assert {module for module in chosen if "latent" in module or "q_proj" in module or module == "lm_head"}
    assert not any("gate" in module or "conv1d" in module or "embeddings" in module for module in chosen)


def test_rules_override_in_order(source, tmp_path):
    rules = [("*.shared_experts.*", "nvfp4"), ("backbone.layers.4.*", "keep"), ("*.4.*in_proj", "nvfp4")]
    rules += [("lm_head", "nvfp4"), ("mtp.*.experts.*", "nvfp4"), ("mtp.*.[qkv]_proj", "fp8")]
    quantize_checkpoint(source, tmp_path, rules=rules)
    tensors = read(tmp_path)
    for module, wanted in {
        "backbone.layers.1.mixer.shared_experts.up_proj": "nvfp4",
        "mtp.layers.1.mixer.shared_experts.up_proj": "nvfp4",
        "mtp.layers.1.mixer.experts.3.up_proj": "nvfp4",
        "mtp.layers.0.mixer.v_proj": "fp8",
        "backbone.layers.0.mixer.in_proj": "fp8",
        "backbone.layers.4.mixer.in_proj": "nvfp4",
        "backbone.layers.4.mixer.out_proj": "keep",
        "lm_head": "nvfp4",
        "backbone.layers.2.mixer.o_proj": "keep",
    }.items():
        assert stored_format(tensors, module) == wanted, module
    declared(tmp_path)


@pytest.mark.parametrize("four_over_six", [None, "mse"])
def test_q_k_v_share_a_scale(source, tmp_path, four_over_six):
    """vLLM multiplies with the three at once and keeps the largest of their scales."""
    quantize_checkpoint(source, tmp_path, rules=[("backbone.*.[qkvo]_proj", "nvfp4")], four_over_six=four_over_six)
    tensors, before, prefix = read(tmp_path), read(source), "backbone.layers.2.mixer."
    amax = max(float(before[f"{prefix}{each}_proj.weight"].abs().max()) for each in "qkv")
    for each in "qkv":
        scale = float(tensors[f"{prefix}{each}_proj.weight_scale_2"])
        assert scale == pytest.approx(amax / (2688 if four_over_six is None else 1536), rel=1e-6)
        assert error(tensors, before, [f"{prefix}{each}_proj"]) < 0.12
    assert float(tensors[f"{prefix}o_proj.weight_scale_2"]) != scale


def test_input_scale(source, tmp_path):
    report = quantize_checkpoint(source, tmp_path / "none")
    assert report.dynamic_fp8
    assert not any(name.endswith("input_scale") for name in read(tmp_path / "none"))
    assert not quantize_checkpoint(source, tmp_path / "one", input_scale=1.5).dynamic_fp8
    tensors = read(tmp_path / "one")
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".input_scale")}
    fp8 = {name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dtype == torch.float8_e4m3fn}
    assert scales.keys() == {name.replace(".weight", ".input_scale") for name in fp8}
    assert all(scale.equal(torch.tensor(1.5)) for scale in scales.values())


def test_metadata_of_mixed_formats(source, tmp_path):
    quantize_checkpoint(source, tmp_path)
    said = declared(tmp_path)
    assert said["quantized_layers"]["backbone.layers.1.mixer.experts.0.up_proj"] == {
        "quant_algo": "W4A16_NVFP4",
        "group_size": 16,
    }
    assert said["quantized_layers"]["backbone.layers.0.mixer.in_proj"] == {"quant_algo": "FP8"}
    assert said["exclude_modules"] == [
        *(f"backbone.layers.{layer}.mixer.conv1d" for layer in (0,)),
        *(f"backbone.layers.1.mixer.{name}" for name in ("fc1_latent_proj", "fc2_latent_proj", "gate")),
        *(f"backbone.layers.2.mixer.{name}_proj" for name in "koqv"),
        "backbone.layers.4.mixer.conv1d",
        "lm_head",
        "mtp*",
    ]


@pytest.mark.parametrize(("format", "algorithm"), [("nvfp4", "W4A16_NVFP4"), ("fp8", "FP8")])
def test_metadata_of_one_format(tmp_path, format, algorithm):
    quantize_checkpoint(save(tmp_path / "in", DENSE), tmp_path / "out", format=format)
    said = declared(tmp_path / "out")
    assert said.pop("exclude_modules")
    expected = dict(quant_algo=algorithm, kv_cache_quant_algo=None)
    assert said == expected | (dict(group_size=16) if format == "nvfp4" else {})
    assert NemotronHConfig.from_pretrained(tmp_path / "out") == NemotronHConfig.from_pretrained(tmp_path / "in")


@pytest.mark.parametrize("name", [*CONFIGS, *MTP_CONFIGS])
def test_every_kind_of_model(tmp_path, name):
    """Biases, layers that differ, a head or none: what is on disk is declared, and all the rest is there."""
    folder = save(tmp_path / "in", (CONFIGS | MTP_CONFIGS)[name])
    report = quantize_checkpoint(folder, tmp_path / "out", format="fp8")
    assert declared(tmp_path / "out")["quant_algo"] == "FP8"
    tensors, before = read(tmp_path / "out"), read(folder)
    assert before.keys() == {name for name in tensors if not name.endswith("_scale")}
    assert sum(row.matrices for row in report.rows) + report.kept == len(before)


def test_a_whole_layer_of_experts_is_excluded_at_once(source, tmp_path):
    """Readers ask for `.experts`, not for one of them."""
    quantize_checkpoint(source, tmp_path, rules=[("*.experts.*", "keep")])
    assert "backbone.layers.1.mixer.experts*" in declared(tmp_path)["exclude_modules"]


@pytest.mark.parametrize("shard_bytes", [20_000, 1])
def test_sharded_equals_whole(source, tmp_path, shard_bytes):
    save(tmp_path / "in", SUPER, max_shard_bytes=shard_bytes)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 4
    whole = quantize_checkpoint(source, tmp_path / "whole")
    report = quantize_checkpoint(tmp_path / "in", tmp_path / "out", max_shard_bytes=shard_bytes)
    for mine, theirs in zip(whole.rows, report.rows, strict=True):  # whose sums run in another order
        assert dataclasses.replace(mine, error=0) == dataclasses.replace(theirs, error=0)
        assert mine.error == pytest.approx(theirs.error, rel=1e-12)
    tensors = read(tmp_path / "out")
    assert_same(tensors, read(tmp_path / "whole"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes_after == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"].values()) == set(report.files)
    for file in report.files:
        shard = load_file(tmp_path / "out" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == shard.keys()
        matrices = {re.sub(r"\.(weight|weight_scale|weight_scale_2)$", "", name) for name in shard}
        assert sum(t.nbytes for t in shard.values()) <= shard_bytes or len(matrices) == 1


@pytest.mark.parametrize("prefix", ["model.", "language_model.backbone."])
def test_other_arrangements(source, folder, tmp_path, prefix):
    """Merged experts and other prefixes come out as the published names."""
    quantize_checkpoint(source, tmp_path / "published")
    rewrite(folder, lambda t: {n.replace("backbone.", prefix): tensor for n, tensor in merge(t).items()})
    assert load_file(folder / "model.safetensors")[f"{prefix}layers.1.mixer.experts.up_proj"].dim() == 3
    quantize_checkpoint(folder, tmp_path / "out")
    assert_same(read(tmp_path / "out"), read(tmp_path / "published"))


@pytest.mark.parametrize("rules", [(), (("backbone.*.[qkv]_proj", "nvfp4"),)])
def test_one_matrix_at_a_time(folder, tmp_path, monkeypatch, rules):
    """Whatever the checkpoint's size: when a tensor is read, those before it are gone, and what was made of them."""
    rewrite(folder, merge)
    seen, left, of_experts = [], [], set()
    read_one, convert = _Reader.read, Quantizer.convert

    def watched_read(self, source):
        left.append(sum(tensor() is not None for tensor in seen))
        tensor = read_one(self, source)
        seen.append(weakref.ref(tensor))
        if source.expert is not None:
            of_experts.add(tensor.nbytes)  # a part of the mapped file
        return tensor

    def watched_convert(self, *arguments):
        made = convert(self, *arguments)
        seen.extend(map(weakref.ref, made.values()))
        return made

    monkeypatch.setattr(_Reader, "read", watched_read)
    monkeypatch.setattr(Quantizer, "convert", watched_convert)
    quantize_checkpoint(folder, tmp_path / "out", rules=rules)
    assert len(left) > 40
    assert max(left) == (1 if rules else 0)  # q, k and v have a common scale: one of them beside the other
    assert of_experts == {64 * 32 * 2}  # one expert's matrix, not the layer's


def test_the_report_counts(source, tmp_path):
    report = quantize_checkpoint(source, tmp_path)
    tensors, before = read(tmp_path), read(source)
    modules = [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]
    assert sum(row.matrices for row in report.rows) == len(modules)
    assert report.kept == len(before) - len(modules)
    assert report.bytes_before == sum(t.nbytes for t in before.values())
    assert report.bytes_after == sum(t.nbytes for t in tensors.values())
    assert report.recipe == "super"
    assert [(row.layer, row.kind, row.format, row.matrices) for row in report.rows] == [
        ("0", "mamba", "fp8", 2),
        ("1", "experts", "nvfp4", 8),
        ("1", "shared experts", "fp8", 2),
        ("3", "mlp", "nvfp4", 2),
        ("4", "mamba", "fp8", 2),
    ]
    parts = {"experts": ".experts.", "shared experts": ".shared_experts.", "mamba": "", "mlp": ""}
    for row in report.rows:
        mine = [m for m in modules if m.startswith(f"backbone.layers.{row.layer}.") and parts[row.kind] in m]
        assert row.matrices == len(mine)
        assert row.error == pytest.approx(error(tensors, before, mine), rel=1e-5)
        assert row.worst == pytest.approx(max(error(tensors, before, [m]) for m in mine), rel=1e-5)
        assert row.bytes_before == sum(before[f"{m}.weight"].nbytes for m in mine)
        assert row.bytes_after == sum(t.nbytes for n, t in tensors.items() if n.rsplit(".", 1)[0] in mine)
        assert 0.01 < row.error < (0.04 if row.format == "fp8" else 0.12)


def test_a_matrix_of_zeros(folder, tmp_path):
    name = "backbone.layers.0.mixer.in_proj"
    rewrite(folder, lambda t: t | {f"{name}.weight": torch.zeros_like(t[f"{name}.weight"])})
    for format in ("nvfp4", "fp8"):
        report = quantize_checkpoint(folder, tmp_path / format, rules=[(name, format)])
        assert not decode(read(tmp_path / format), name).any()
        assert all(math.isfinite(row.error) for row in report.rows)


def test_small_files_are_copied_and_code_is_not(folder, tmp_path):
    copied = {"tokenizer.json": "{}", "generation_config.json": "{}", "chat_template.jinja": "x", "merges.txt": "a b"}
    left = {"modeling_nemotron_h.py": "raise", "README.md": "bfloat16", "pytorch_model.bin.index.json": "{}"}
    for name, text in (copied | left).items():
        (folder / name).write_text(text)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}, note="kept")
    report = quantize_checkpoint(folder, tmp_path / "out")
    assert set(report.copied) == copied.keys()
    names = set(os.listdir(tmp_path / "out"))
    assert names == {*copied, "config.json", "hf_quant_config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == text for name, text in copied.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["note"] == "kept"
    assert "auto_map" not in config


@pytest.mark.parametrize("how", ["config", "hf_quant_config", "dtype", "scale"])
def test_already_quantised(folder, tmp_path, how):
    quantize_checkpoint(folder, tmp_path / "out")
    shown = "in_proj.weight"
    if how == "config":
        edit_config(folder, quantization_config={"quant_method": "modelopt"})
        shown = "config.json"
    elif how == "hf_quant_config":
        os.replace(tmp_path / "out" / "hf_quant_config.json", folder / "hf_quant_config.json")
        shown = "hf_quant_config.json"
    elif how == "dtype":
        rewrite(folder, lambda t: t | {n: w.to(torch.float8_e4m3fn) for n, w in t.items() if "in_proj" in n})
    else:
        rewrite(folder, lambda t: t | {"lm_head.weight_scale": torch.ones(())})
        shown = "lm_head.weight_scale"
    with pytest.raises(CheckpointError, match="quantised") as raised:
        quantize_checkpoint(folder, tmp_path / "again")
    assert str(folder) in str(raised.value)
    assert shown in str(raised.value)
    assert not (tmp_path / "again").exists()


def break_nan(folder):
    name = "backbone.layers.3.mixer.up_proj.weight"
    rewrite(folder, lambda t: t | {name: t[name].index_fill(0, torch.tensor([1]), math.nan)})


def break_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_shape(folder):
    rewrite(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"][:, :-1].contiguous()})


def break_pickle(folder):
    os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nan, r"model.safetensors: backbone.layers.3.mixer.up_proj.weight must be finite .* got 48 values"),
        (break_truncated, r"model.safetensors is truncated: \S+ ends at byte"),
        (break_shape, r"lm_head.weight in model.safetensors: expected \(96, 48\), got \(96, 47\)"),
        (break_pickle, r"must have safetensors, got only pytorch_model.bin"),
    ],
)
def test_damaged(folder, tmp_path, damage, message):
    damage(folder)
    with pytest.raises((CheckpointError, FileNotFoundError), match=message):
        quantize_checkpoint(folder, tmp_path / "out", max_shard_bytes=20_000)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_width_that_nvfp4_cannot_have(tmp_path):
    folder = save(tmp_path / "in", CONFIGS["moe-odd-experts"])
    with pytest.raises(CheckpointError, match="multiple of 16") as raised:
        quantize_checkpoint(folder, tmp_path / "out")
    assert "experts.{0-7}.down_proj.weight in model.safetensors: (48, 36)" in str(raised.value)
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(folder, tmp_path / "out", rules=[("*.experts.*", "fp8")])
    assert declared(tmp_path / "out")["quant_algo"] == "MIXED_PRECISION"


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_stopped_run_leaves_nothing(source, tmp_path, stop):
    def progress(done, total):
        if done > total / 2:
            raise stop

    with pytest.raises(stop):
        quantize_checkpoint(source, tmp_path / "out", max_shard_bytes=20_000, progress=progress)
    assert os.listdir(tmp_path / "out") == []


def test_progress(source, tmp_path):
    calls = []
    report = quantize_checkpoint(source, tmp_path, progress=lambda *call: calls.append(call))
    assert {total for _, total in calls} == {report.bytes_before}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == report.bytes_before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(format="int4"), "format must be one of 'nvfp4', 'fp8', got 'int4'"),
        (dict(rules=[("*.nothing", "fp8")]), r"rule '\*.nothing' must match a matrix .* got none"),
        (dict(rules=[("*.gate", "fp8")]), "routers"),
        (dict(rules=[("lm_head", "int8")]), "rule 'lm_head' must choose 'nvfp4', 'fp8' or 'keep', got 'int8'"),
        (dict(rules=[("*.experts.2.*", "keep")]), "all of backbone.layers.1.mixer.experts one format"),
        (dict(rules=[("*.2.mixer.q_proj", "fp8")]), "all of backbone.layers.2.mixer.qkv one format"),
        (dict(rules=[("*", "keep")]), "rules must leave a matrix"),
        (dict(input_scale=0.0), "input_scale must be positive and finite, got 0.0"),
        (dict(four_over_six="max"), "four_over_six must be"),
        (
            dict(format="fp8", four_over_six="mse"),
            "four_over_six must be None where no matrix becomes NVFP4",
        ),
        (dict(rules=[("*_proj", "nvfp4")], input_scale=1.0), "input_scale must be None where no matrix becomes FP8"),
        (dict(max_shard_bytes=0), "max_shard_bytes must be positive, got 0"),
    ],
)
def test_bad_arguments(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_output_is_never_overwritten_by_accident(source, folder, tmp_path):
    before = read(folder)
    for inside in (folder, folder / "out", tmp_path / "x" / ".." / "in"):
        with pytest.raises(ValueError, match="output must not be in the folder that is read"):
            quantize_checkpoint(folder, inside, force=True)
    assert_same(read(folder), before)
    with pytest.raises(FileExistsError, match="output must be empty"):
        quantize_checkpoint(source, folder)
    assert_same(read(folder), before)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="output must be a folder"):
        quantize_checkpoint(folder, tmp_path / "file", force=True)


def test_force_replaces_the_checkpoint(source, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(source, out, max_shard_bytes=20_000)
    (out / "notes.md").write_text("mine")
    quantize_checkpoint(source, out, format="fp8", force=True)
    quantize_checkpoint(source, tmp_path / "fresh", format="fp8")
    assert set(os.listdir(out)) == {*os.listdir(tmp_path / "fresh"), "notes.md"}
    assert_same(read(out), read(tmp_path / "fresh"))


def test_the_loader_runs_it(source, tmp_path):
    """NVFP4 weights: the logits are those of a bfloat16 model that has the decoded matrices."""
    quantize_checkpoint(source, tmp_path / "out", rules=[("backbone.*_proj", "nvfp4")], max_shard_bytes=20_000)
    tensors = read(tmp_path / "out")
    model = NemotronHForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = NemotronHForCausalLM.from_pretrained(source, dtype=torch.float32)
    changed = 0
    with torch.no_grad():
        for name, place in checkpoint._places(plain).items():
            if f"{name}_scale" in tensors:
                parameter = plain.get_parameter(place.name)
                matrix = parameter if place.expert is None else parameter[place.expert]
                matrix.copy_(torch.from_numpy(decode(tensors, name.removesuffix(".weight"))))
                changed += 1
        ids = torch.arange(40).view(2, 20)
        got, expected, before = (m(ids) for m in (model, plain, NemotronHForCausalLM.from_pretrained(source)))
    assert changed == sum(name.endswith("_scale_2") for name in tensors) > 15
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, before.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (SUPER, dict()),
        (SUPER, dict(format="fp8", input_scale=0.5)),
        (SUPER, dict(rules=[("*.experts.*", "keep"), ("mtp.*.[qkv]_proj", "fp8"), ("lm_head", "nvfp4")])),
        (DENSE, dict()),
    ],
)
def test_the_loader_saves_it_again(tmp_path, values, options):
    """The same metadata to the byte, and the same tensors."""
    quantize_checkpoint(save(tmp_path / "in", values), tmp_path / "out", **options)
    NemotronHForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    for file in ("config.json", "hf_quant_config.json"):
        assert (tmp_path / "again" / file).read_text() == (tmp_path / "out" / file).read_text()
    assert_same(read(tmp_path / "again"), read(tmp_path / "out"))
    plain = NemotronHForCausalLM.from_pretrained(tmp_path / "out", dequantize=True)
    assert plain.get_parameter("backbone.layers.0.mixer.in_proj.weight").dtype == torch.bfloat16


def test_files_are_mapped_as_they_lie(source, tmp_path):
    """Wide tensors lie on multiples of their width; the library's other reader sees the same."""
    report = quantize_checkpoint(source, tmp_path, max_shard_bytes=50_000)
    assert len(report.files) > 1
    for file in report.files:
        content = (tmp_path / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        with safe_open(tmp_path / file, framework="np") as mapped:
            assert mapped.metadata() == {"format": "pt"}
        for name, place in header.items():
            if name != "__metadata__":
                width = {"F32": 4, "BF16": 2, "U8": 1, "F8_E4M3": 1}[place["dtype"]]
                assert (8 + length + place["data_offsets"][0]) % width == 0
