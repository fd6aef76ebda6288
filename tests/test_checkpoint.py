"""Hugging Face folders: configurations of both generations, safetensors in every arrangement, and damaged ones."""

import dataclasses
import json
import math
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_ops.models import PRESETS, CheckpointError, NemotronHConfig, NemotronHForCausalLM, checkpoint
from hybrid_ops.models.shard_writer import ShardWriter

from .random_models import COMMON, CONFIGS, redraw

NAME = "biases"


@pytest.fixture(scope="module")
def model():
    return redraw(NemotronHForCausalLM(NemotronHConfig(**CONFIGS[NAME] | COMMON)))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Apply `change` to the tensors of a folder with one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **changes):
    """Set fields of config.json; ... removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def assert_equal(mine, theirs):
    ours, other = mine.state_dict(), theirs.state_dict()
    assert ours.keys() == other.keys()
    for name, tensor in ours.items():
        assert tensor.equal(other[name]), name


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1])
def test_round_trip(model, tmp_path, shard_bytes):
    model.save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
    again = NemotronHForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_equal(again, model)
    shards = [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]
    assert len(shards) == {10**9: 1, 1: len(model.state_dict())}.get(shard_bytes, len(shards))
    if shard_bytes == 20_000:
        assert len(shards) > 2
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])


def test_saving_again_in_another_arrangement(model, tmp_path):
    """An index of an earlier save must not be taken for the new one."""
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    other = redraw(NemotronHForCausalLM(model.config), seed=5)
    other.save_pretrained(tmp_path)
    assert_equal(NemotronHForCausalLM.from_pretrained(tmp_path), other)
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert_equal(NemotronHForCausalLM.from_pretrained(tmp_path), model)


def test_a_save_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        model.save_pretrained(tmp_path / "out", max_shard_bytes=0)
    assert not (tmp_path / "out").exists()
    write, written = ShardWriter.write, []

    def full(self, tensors):
        if len(written) == 10:
            raise OSError("no space left")
        written.append(write(self, tensors))

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path / "out", max_shard_bytes=1)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("backbone.", "model."),
        lambda name: "language_model." + name,
        lambda name: "language_model." + name.replace("backbone.", "model."),
    ],
)
def test_prefixes(model, folder, rename):
    rewrite(folder, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert_equal(NemotronHForCausalLM.from_pretrained(folder), model)


def test_dtypes(model, folder):
    """bf16 per-head parameters are read, and float32 in a model of any dtype; None is the checkpoint's dtype."""
    rewrite(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    loaded = NemotronHForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    for dtype, per_head in (
        (None, torch.float32),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        loaded = NemotronHForCausalLM.from_pretrained(folder, dtype=dtype)
        for name, parameter in loaded.named_parameters():
            special = name.endswith(("A_log", ".D", "dt_bias"))
            assert parameter.dtype == (per_head if special else dtype or torch.bfloat16), name
            expected = model.state_dict()[name].bfloat16().to(parameter.dtype)
            assert parameter.equal(expected), name


def test_another_configuration(model, folder):
    config = NemotronHConfig.from_pretrained(folder, clamp_time_step_min="prefill")
    assert NemotronHForCausalLM.from_pretrained(folder, config=config).config.clamp_time_step_min == "prefill"


def test_every_problem_is_named(model, folder):
    def change(tensors):
        del tensors["backbone.layers.1.mixer.D"]
        tensors["backbone.layers.1.mixer.scale"] = torch.ones(3)
        tensors["lm_head.weight"] = torch.ones(96, 41)
        tensors["backbone.norm_f.weight"] = torch.ones(40, dtype=torch.int64)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        NemotronHForCausalLM.from_pretrained(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "1 missing:\n    backbone.layers.1.mixer.D" in message
    assert "1 surplus:\n    backbone.layers.1.mixer.scale in model.safetensors" in message
    assert "lm_head.weight in model.safetensors: expected (96, 40), got (96, 41)" in message
    assert "backbone.norm_f.weight in model.safetensors: expected F64, F32, F16, BF16, got I64" in message


def test_the_same_tensor_twice(folder):
    rewrite(folder, lambda tensors: tensors | {"model.norm_f.weight": torch.ones(40)})
    with pytest.raises(CheckpointError, match=r"backbone.norm_f.weight must be there once, got .* and "):
        NemotronHForCausalLM.from_pretrained(folder)


def test_a_truncated_file_names_file_and_tensor(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__")
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"model.safetensors is truncated: {last} ends at byte"):
        NemotronHForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100])
def test_a_file_cut_in_its_header(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|corrupt) or not safetensors"):
        NemotronHForCausalLM.from_pretrained(folder)


def set_length(data):
    return (2**62).to_bytes(8, "little") + data[8:]


def spoil_header(data):
    return data[:9] + b"\xff" + data[10:]


def append(data):
    return data + b"surplus"


def pickled(data):
    return b"\x80\x02}q\x00." + data


@pytest.mark.parametrize("damage", [set_length, spoil_header, append, pickled])
def test_a_corrupt_file(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (corrupt|truncated)"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_a_shape_that_does_not_fit_its_bytes(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[96,40]', b'"shape":[96,41]'))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"must have safetensors, got only pytorch_model.bin: pickle files"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_nothing_to_load(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        NemotronHForCausalLM.from_pretrained(tmp_path / "absent")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must have model\.safetensors or model\.safetensors\.index\.json"):
        NemotronHForCausalLM.from_pretrained(folder)


def test_one_file_of_another_name(model, folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert_equal(NemotronHForCausalLM.from_pretrained(folder), model)
    (folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"got more\.safetensors, weights\.safetensors"):
        NemotronHForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "model-00009-of-00009.safetensors",
            "names model-00009-of-00009.safetensors for lm_head.weight, but the folder",
        ),
        ("../model.safetensors", r"the file of lm_head.weight must be in the folder itself, got '\.\./model"),
        (7, "must have a weight_map of tensor names to file names"),
    ],
)
def test_a_wrong_index(model, tmp_path, file, message):
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        NemotronHForCausalLM.from_pretrained(tmp_path)


def test_progress(folder, capsys):
    NemotronHForCausalLM.from_pretrained(folder, progress=True)
    assert "loading" in capsys.readouterr().err
    NemotronHForCausalLM.from_pretrained(folder)
    assert capsys.readouterr().err == ""


def test_memory(folder, monkeypatch):
    """While tensors are copied into the model, the one before may be in memory still, the others are not."""
    alive, most, read = [], 0, checkpoint._read

    def watched(entries):
        nonlocal most
        for name, tensor in read(entries):
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
            yield name, tensor

    monkeypatch.setattr(checkpoint, "_read", watched)
    loaded = NemotronHForCausalLM.from_pretrained(folder)
    assert len(alive) == len(loaded.state_dict()) > 20
    assert most <= 2


LISTS = {
    "transformers 5": {"M": "linear_attention", "*": "full_attention", "-": "mlp"},
    "before": {"M": "mamba", "*": "attention", "-": "mlp"},
}


@pytest.mark.parametrize("names", LISTS)
@pytest.mark.parametrize("field", ["layers_block_type", "layer_types"])
def test_layers_as_a_list(folder, names, field):
    pattern = CONFIGS[NAME]["hybrid_override_pattern"]
    expected = NemotronHConfig.from_pretrained(folder)
    edit_config(folder, hybrid_override_pattern=..., **{field: [LISTS[names][letter] for letter in pattern]})
    assert NemotronHConfig.from_pretrained(folder) == expected


def test_older_names_and_ignored_fields(folder):
    values = json.loads((folder / "config.json").read_text())
    edit_config(
        folder,
        head_dim=...,
        attention_head_dim=values["head_dim"],
        layer_norm_epsilon=...,
        norm_eps=1e-6,
        torch_dtype="bfloat16",
        time_step_limit=[0.0, {"__float__": "Infinity"}],
        expand=7,
        rope_theta=10000,
        num_logits_to_keep=1,
        moe_intermediate_size=7688,
    )
    config = NemotronHConfig.from_pretrained(folder)
    assert (config.head_dim, config.layer_norm_epsilon, config.dtype) == (values["head_dim"], 1e-6, "bfloat16")
    assert config.time_step_limit == (0.0, math.inf)
    edit_config(folder, time_step_limit=[0.001, 1e308])
    assert NemotronHConfig.from_pretrained(folder).time_step_limit == (0.001, math.inf)


def test_infinity_as_python_writes_it(folder):
    edit_config(folder, time_step_limit=[0, math.inf])
    assert "Infinity" in (folder / "config.json").read_text()
    assert NemotronHConfig.from_pretrained(folder).time_step_limit == (0.0, math.inf)


def test_end_tokens_of_the_generation_configuration(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    config = NemotronHConfig.from_pretrained(folder)
    assert config.eos_token_ids == (2, 11)
    config.save_pretrained(folder / "again")
    assert NemotronHConfig.from_pretrained(folder / "again").eos_token_ids == (2, 11)


@pytest.mark.parametrize("preset", PRESETS)
def test_config_round_trip(preset, tmp_path):
    config = NemotronHConfig.preset(preset, clamp_time_step_min="prefill", time_step_limit=(0.01, math.inf))
    config.save_pretrained(tmp_path)
    assert NemotronHConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hybrid_override_pattern="M?*-"), "got '\\?' for layer 1"),
        (dict(hybrid_override_pattern="", num_hidden_layers=0), "at least one layer"),
        (dict(hybrid_override_pattern=...), "hybrid_override_pattern or layers_block_type must be there, got neither"),
        (dict(layers_block_type=["mamba"]), "hybrid_override_pattern and layers_block_type must agree"),
        (dict(layers_block_type=["conv"]), "layers_block_type must consist of .*, got conv"),
        (dict(num_hidden_layers=3), "num_hidden_layers must be the length of the pattern, 4, got 3"),
        (dict(attention_head_dim=99), "head_dim and attention_head_dim must agree, got 24 and 99"),
        (dict(n_groups=2), "n_groups must divide mamba_num_heads=3, got 2"),
        (dict(num_key_value_heads=2), "num_key_value_heads must divide num_attention_heads=5, got 2"),
        (dict(hidden_size=0), "hidden_size must be a positive integer, got 0"),
        (dict(hidden_size="big"), "hidden_size must be a positive integer, got 'big'"),
        (dict(conv_kernel=9), "conv_kernel must be at most 8, got 9"),
        (dict(time_step_limit=[1, 0]), "time_step_limit must be"),
        (dict(clamp_time_step_min="sometimes"), "clamp_time_step_min must be 'never', 'prefill' or 'always'"),
        (dict(mamba_ssm_cache_dtype="int4"), "mamba_ssm_cache_dtype must be"),
        (dict(mlp_hidden_act="silu"), "mlp_hidden_act must be 'relu2', got 'silu'"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings must be False, got True"),
        (dict(model_type="llama"), "model_type must be 'nemotron_h' or 'nemotron_h_puzzle', got 'llama'"),
    ],
)
def test_bad_configurations(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        NemotronHConfig.from_pretrained(folder)
    assert "config.json" in str(error.value)


def test_a_configuration_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        NemotronHConfig.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got list"):
        NemotronHConfig.from_pretrained(folder)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"name must be one of 'nemotron-h-4b', .*, got 'nemotron-5'"):
        NemotronHConfig.preset("nemotron-5")


def test_config_is_frozen():
    config = NemotronHConfig.preset("tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 7
