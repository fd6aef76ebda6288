"""`hybrid_ops.integrations.transformers`: patched models against the same models, unpatched."""

import copy

import pytest
import torch
from torch import nn

from hybrid_ops.integrations.transformers import mamba2, moe, norm, patch, patched, unpatch

from .conftest import version
from .random_models import COMMON, CONFIGS, redraw

transformers = pytest.importorskip("transformers", minversion="5.17")

VOCAB = COMMON["vocab_size"]
NAMES = {
    "NemotronH": "NemotronH",
    "NemotronH-latent": "NemotronH",
    "Mamba2": "Mamba2",
    "Bamba": "Bamba",
    "Zamba2": "Zamba2",
    "FalconH1": "FalconH1",
    "FalconH1-norm": "FalconH1",
    "FalconH1-gate-first": "FalconH1",
    "GraniteMoeHybrid": "GraniteMoeHybrid",
}
COMMON_HYBRID = dict(
    vocab_size=VOCAB,
    eos_token_id=None,
    pad_token_id=0,
    tie_word_embeddings=False,
    hidden_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    mamba_d_state=16,
)
MAMBA = dict(mamba_n_heads=6, mamba_d_head=16, mamba_n_groups=2, mamba_chunk_size=16, time_step_limit=(0.01, 1.5))
FALCON = COMMON_HYBRID | MAMBA | dict(mamba_d_ssm=96, num_hidden_layers=2, ssm_in_multiplier=0.7, key_multiplier=0.8)
SMALL = {
    "NemotronH": COMMON | CONFIGS["moe-groups"] | dict(hybrid_override_pattern="ME*-"),
    "NemotronH-latent": COMMON | CONFIGS["moe-latent"] | dict(hybrid_override_pattern="MEM*", use_bias=True),
    "Mamba2": dict(
        vocab_size=VOCAB,
        eos_token_id=None,
        pad_token_id=0,
        hidden_size=48,
        num_heads=6,
        head_dim=16,
        state_size=16,
        n_groups=2,
        num_hidden_layers=3,
        chunk_size=16,
        time_step_limit=[0.01, 1.5],
    ),
    "Bamba": COMMON_HYBRID | MAMBA | dict(num_hidden_layers=3, attn_layer_indices=[1]),
    "Zamba2": COMMON_HYBRID
    | dict(
        num_key_value_heads=4,
        n_mamba_heads=6,
        mamba_ngroups=2,
        chunk_size=16,
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        use_shared_attention_adapter=True,
        adapter_rank=4,
    ),
    "FalconH1": FALCON | dict(mamba_rms_norm=False),
    "FalconH1-norm": FALCON | dict(mamba_rms_norm=True, mamba_norm_before_gate=True),
    "FalconH1-gate-first": FALCON | dict(mamba_rms_norm=True, mamba_norm_before_gate=False),
    "GraniteMoeHybrid": COMMON_HYBRID
    | MAMBA
    | dict(
        mamba_n_groups=1,  # transformers < 5.23 has no groups in the norm
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_local_experts=6,
        num_experts_per_tok=3,
        shared_intermediate_size=40,
    ),
}


def build(name, **others):
    config = getattr(transformers, f"{NAMES[name]}Config")(**SMALL[name] | others)
    return redraw(getattr(transformers, f"{NAMES[name]}ForCausalLM")(config)).eval()


def skip_where_transformers_is_wrong(name):
    """Up to 5.17 at least: a token's features lose a dimension, and a batch is added to itself, each row to each."""
    if name.startswith("FalconH1-") and version(transformers.__version__) < (5, 23):
        pytest.skip("transformers decodes FalconH1 with a norm wrongly for batches > 1")


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            made[name] = build(name)
        unpatch(made[name])
        return made[name]

    return get


IDS = torch.randint(1, VOCAB, (2, 37), generator=torch.Generator().manual_seed(1))
EVERYTHING = torch.ones_like(IDS)


def padded():
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    return mask


@torch.no_grad()
def logits(model, mask=EVERYTHING, **options):
    inputs = (IDS.to(model.device), mask.to(model.device))
    return model(inputs[0], attention_mask=inputs[1], **options).logits.float().cpu()


def go_on(model, ids, cache):
    """The logits of these tokens behind those in the cache."""
    word = "cache_params" if isinstance(model, transformers.Mamba2ForCausalLM) else "past_key_values"
    return model(ids, use_cache=True, **{word: cache}).logits


def close(got, expected):
    return (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def count(monkeypatch):
    """How often the operators are called."""
    calls = {}

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    operators = {
        mamba2: ("causal_conv1d", "causal_conv1d_update", "ssd_chunk_scan", "ssd_state_update"),
        norm: ("rms_norm", "gated_rms_norm"),
        moe: ("moe_router", "moe_sort", "moe_mlp"),
    }
    for module, names in operators.items():
        for name in names:
            monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return calls


def modules_of(model, *words):
    """How many modules there are with such a word in their class's name."""
    return sum(any(word in type(m).__name__ for word in words) for m in model.modules())


@pytest.mark.parametrize("mask", [EVERYTHING, padded()], ids=["full", "padded"])
@pytest.mark.parametrize("name", SMALL)
def test_logits(name, mask, models):
    model = models(name)
    expected = logits(model, mask)
    assert expected.std() >= 1
    with patched(model):
        got = logits(model, mask)
    real = mask.bool()
    assert close(got[real], expected[real])
    assert torch.equal(logits(model, mask), expected)


@pytest.mark.parametrize("name", SMALL)
def test_every_module_calls_its_operator(name, models, monkeypatch):
    """Or patch replaced nothing, and all other tests compare a model with itself."""
    model = models(name)
    calls = count(monkeypatch)
    logits(model)
    assert calls == {}
    patch(model)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        go_on(model, IDS, cache)
    mixers, experts = modules_of(model, "Mixer", "MambaLayer"), modules_of(model, "Experts")
    norms = [type(m).__name__ for m in model.modules() if "RMSNorm" in type(m).__name__]
    prefill = {"causal_conv1d": mixers, "ssd_chunk_scan": mixers, "gated_rms_norm": sum("Gated" in n for n in norms)}
    prefill |= {"moe_router": modules_of(model, "TopkRouter"), "moe_sort": experts, "moe_mlp": experts}
    assert mixers > 0
    assert {k: v for k, v in calls.items() if k != "rms_norm"} == {k: v for k, v in prefill.items() if v}
    assert calls["rms_norm"] >= sum("Gated" not in n for n in norms)  # Zamba2 calls shared ones more often
    calls.clear()
    with torch.no_grad():
        go_on(model, IDS[:, :1], cache)
    assert (calls["causal_conv1d_update"], calls["ssd_state_update"]) == (mixers, mixers)
    assert "causal_conv1d" not in calls


@pytest.mark.parametrize("mask", [EVERYTHING, padded()], ids=["full", "padded"])
@pytest.mark.parametrize("name", SMALL)
def test_generate(name, mask, models):
    skip_where_transformers_is_wrong(name)
    model = models(name)
    options = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = model.generate(IDS, **options)
    assert len(expected[:, IDS.shape[1] :].unique()) > 8
    with patched(model):
        assert model.generate(IDS, **options).tolist() == expected.tolist()


def in_pieces(model):
    """Logits of prefill, one token, several, one: none of these may forget what was before."""
    cache = transformers.DynamicCache(config=model.config)
    pieces = IDS.to(model.device).split([2, 1, 20, 1, 1, 12], dim=1)
    return torch.cat([go_on(model, piece, cache).detach() for piece in pieces], dim=1).float().cpu()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("grad", [False, True])
def test_logits_in_pieces(name, grad, models):
    """With gradients recorded a token goes through the operators that have them."""
    skip_where_transformers_is_wrong(name)
    model = models(name)
    with torch.set_grad_enabled(grad):
        expected = in_pieces(model)
        with patched(model):
            assert close(in_pieces(model), expected)


def same_gradients(model, loss):
    """Of all parameters, patched and not."""

    def gradients():
        model.zero_grad()
        loss().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with patched(model):
        got = gradients()
    model.zero_grad()
    assert got.keys() == expected.keys()
    for key, theirs in expected.items():
        assert (got[key] - theirs).norm() <= 1e-3 * theirs.norm(), key


@pytest.mark.parametrize("name", SMALL)
def test_gradients(name, models):
    model = models(name).train()
    same_gradients(model, lambda: model(IDS, attention_mask=padded(), labels=IDS, use_cache=False).loss)
    model.eval()


@pytest.mark.parametrize("name", SMALL)
def test_gradients_through_a_cache(name, models):
    skip_where_transformers_is_wrong(name)
    model = models(name)

    def loss():
        cache = transformers.DynamicCache(config=model.config)
        return sum(go_on(model, piece, cache).pow(2).mean() for piece in IDS[:, :18].split(6, dim=1))

    same_gradients(model, loss)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_bfloat16(name, device, models):
    skip_where_transformers_is_wrong(name)
    rounded = copy.deepcopy(models(name)).to(torch.bfloat16)
    for buffer_name, buffer in rounded.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):  # so large that rounding swaps no experts
            buffer.copy_(2.0 * torch.randperm(len(buffer), generator=torch.Generator().manual_seed(0)))
    exact = copy.deepcopy(rounded).float()  # the same weights
    rounded.to(device)
    with patched(exact):  # transformers 5.17 takes mamba_ssm's kernels on the CPU too, where it finds them
        whole, pieces = logits(exact), in_pieces(exact)

    def errors():
        return [
            (got - expected).pow(2).mean().sqrt()
            for got, expected in zip((logits(rounded), in_pieces(rounded)), (whole, pieces), strict=True)
        ]

    theirs = errors()
    with patched(rounded):
        ours = errors()
    assert all(0 < mine <= 2 * other for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_beam_search(models):
    model = models("NemotronH")
    options = dict(attention_mask=EVERYTHING, max_new_tokens=12, num_beams=3, do_sample=False, pad_token_id=0)
    expected = model.generate(IDS, **options)
    with patched(model):
        assert model.generate(IDS, **options).tolist() == expected.tolist()


def test_router_logits_are_still_recorded(models):
    if version(transformers.__version__) < (5, 23):
        pytest.skip("transformers does not record NemotronH's yet")
    model = models("NemotronH")
    with torch.no_grad():
        (expected,) = model(IDS, output_router_logits=True).router_logits
        with patched(model):
            (got,) = model(IDS, output_router_logits=True).router_logits
    assert close(got, expected)


@pytest.mark.parametrize("name", SMALL)
def test_patch_and_unpatch(name, models):
    model = models(name)
    expected, state = logits(model), dict(model.state_dict())
    before = {module: dict(vars(module)) for module in model.modules()}
    first = patch(model)
    assert str(patch(model)) == str(first)
    with patched(model):  # it was patched before, so it is behind
        pass
    assert not torch.equal(logits(model), expected)
    assert all(tensor.data_ptr() == state[key].data_ptr() for key, tensor in model.state_dict().items())
    unpatch(model)
    unpatch(model)
    assert {module: dict(vars(module)) for module in model.modules()} == before
    assert torch.equal(logits(model), expected)


def test_the_report(models):
    report = patch(models("NemotronH"))
    assert report.replaced["MoE experts (NemotronHExperts)"] == ["model.layers.1.mixer.experts"]
    (attention,) = [what for what in report.left if "Attention" in what]
    assert report.left[attention] == ["model.layers.2.mixer"]
    assert str(report).startswith("hybrid_ops in NemotronHForCausalLM: 9 modules replaced, 3 left\n")
    assert "\n  left   1 NemotronHAttention (attention is chosen by attn_implementation)" in str(report)


# what is refused


def untouched(model):
    return not any("forward" in vars(module) for module in model.modules())


def test_an_unknown_model():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"model must be of one of the families nemotron_h, .*LlamaForCausalLM"):
        patch(model)
    assert untouched(model)
    unpatch(model)
    assert untouched(model)


def test_code_that_a_checkpoint_brings_along():
    """Its classes have the names of transformers' own, and other arguments."""
    NemotronHMamba2Mixer = type("NemotronHMamba2Mixer", (nn.Identity,), {})
    with pytest.raises(ValueError, match="as they are in transformers itself"):
        patch(nn.Sequential(NemotronHMamba2Mixer()))


@pytest.mark.parametrize("call", [patch, unpatch, lambda model: patched(model).__enter__()])
def test_no_model(call):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        call("nvidia/Nemotron-H-8B-Base-8K")


def test_a_dtype(models):
    model = copy.deepcopy(models("NemotronH"))
    model.model.layers[-1].norm.double()
    with pytest.raises(TypeError, match=r"float32, bfloat16, float16, got model.layers.3.norm.weight in torch.float64"):
        patch(model)
    assert untouched(model)


def test_a_dtype_of_the_convolution(models):
    model = copy.deepcopy(models("Mamba2"))
    model.backbone.layers[0].mixer.conv1d.double()
    with pytest.raises(TypeError, match=r"got backbone.layers.0.mixer.conv1d.weight in torch.float64"):
        patch(model)
    assert untouched(model)


def test_a_device(models):
    model = copy.deepcopy(models("Bamba")).to("meta")
    with pytest.raises(ValueError, match=r"must be on the CPU or a CUDA device, got model.layers.0.* on meta"):
        patch(model)
    assert untouched(model)


def test_hooks_of_accelerate(models):
    model = copy.deepcopy(models("Mamba2"))
    model.backbone.layers[0].mixer._hf_hook = object()
    with pytest.raises(ValueError, match="accelerate"):
        patch(model)
    assert untouched(model)


def test_tensor_parallel(models):
    model = copy.deepcopy(models("Mamba2"))
    model._tp_size = 2
    with pytest.raises(ValueError, match="tp_size=2"):
        patch(model)
    assert untouched(model)


def test_an_old_transformers(models, monkeypatch):
    model = copy.deepcopy(models("Mamba2"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.1")
    with pytest.raises(RuntimeError, match=r"transformers must be 5.17 or newer, got 4.57.1"):
        patch(model)
    assert untouched(model)


def test_what_does_not_fit_is_left(models):
    model = copy.deepcopy(models("NemotronH"))
    experts, mixer = model.model.layers[1].mixer.experts, model.model.layers[0].mixer
    experts.act_fn, mixer.activation, mixer.act = nn.GELU(), "gelu", nn.GELU()
    other = model.model.norm_f.forward = model.model.norm_f.forward
    expected = logits(model)
    with patched(model) as report:
        text = str(report)
        assert model.model.norm_f.forward is other
        assert close(logits(model), expected)
    assert model.model.norm_f.forward is other
    assert "NemotronHExperts (their activation is GELU, the operators know relu2 and, gated, silu)" in text
    assert "NemotronHMamba2Mixer (its activation is 'gelu', the operators know silu)" in text
    assert "NemotronHRMSNorm (something else has replaced its forward): model.norm_f" in text


def test_an_error_inside_the_block(models):
    model = models("Mamba2")
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert untouched(model)


# packed sequences, autocast, copies, compilation


@pytest.mark.parametrize("packing", ["seq_idx", "cu_seqlens"])
def test_packed_sequences(packing):
    """transformers' torch path refuses them; here each sequence is as if it were alone."""
    model = build("Bamba", attn_layer_indices=[])
    lengths = [5, 12, 20]
    row = IDS[:1]
    boundaries = dict(
        seq_idx=torch.arange(3).repeat_interleave(torch.tensor(lengths))[None], cu_seqlens=torch.tensor([0, 5, 17, 37])
    )
    packed = {packing: boundaries[packing]}
    with torch.no_grad():
        pieces = [model(piece, use_cache=False).logits for piece in row.split(lengths, dim=1)]
        with patched(model):
            assert close(model(row, use_cache=False, **packed).logits, torch.cat(pieces, dim=1))
            mixer, cache = model.model.layers[0].mamba, transformers.DynamicCache(config=model.config)
            with pytest.raises(ValueError, match=f"{packing} must be None with a cache"):
                mixer(torch.ones(1, 37, 48), cache_params=cache, **packed)


@pytest.mark.parametrize("name", ["NemotronH-latent", "GraniteMoeHybrid"])
def test_autocast(name, models):
    model = models(name)
    expected = logits(model)

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            return (logits(model) - expected).pow(2).mean().sqrt()

    theirs = error()
    with patched(model):
        assert 0 < error() <= 2 * theirs


def test_a_copy_is_a_model_of_its_own(models):
    model = models("NemotronH")
    patch(model)
    expected, twin = logits(model), copy.deepcopy(model)
    redraw(twin, seed=1)
    assert torch.equal(logits(model), expected)
    assert not close(logits(twin), expected)
    unpatch(twin)
    assert untouched(twin)
    assert not untouched(model)


def test_gradient_checkpointing(models):
    model = copy.deepcopy(models("NemotronH")).train()
    model.gradient_checkpointing_enable()
    same_gradients(model, lambda: model(IDS, labels=IDS, use_cache=False).loss)


def test_compiled(models):
    model = models("NemotronH")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        with patched(model):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert close(compiled(IDS, use_cache=False).logits, expected)
