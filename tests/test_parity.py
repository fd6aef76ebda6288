"""Our model against transformers' own `nemotron_h`, on weights that it saved and we loaded."""

import functools
import math

import pytest
import torch

from hybrid_ops import ssd_chunk_scan
from hybrid_ops.models import NemotronHConfig, NemotronHForCausalLM
from hybrid_ops.nn import Attention, Mamba2Mixer, MoE, mamba2

from .random_models import COMMON, CONFIGS, redraw

transformers = pytest.importorskip("transformers", minversion="5.17")

TOLERANCE = 1e-4  # float32, of logits with a standard deviation of 1 to 4; set by the issue
NO_CLAMP = (0.0, math.inf)


class Pair:
    """The same weights in both, theirs with dt clamped as given by `theirs_untouched`."""

    def __init__(self, name, folder):
        self.theirs = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**CONFIGS[name] | COMMON)).eval()
        redraw(self.theirs)
        self.theirs.save_pretrained(folder)
        self.folder = folder
        self.untouched = [m.time_step_limit for m in self.mixers()]
        self.ids = torch.randint(0, COMMON["vocab_size"], (2, 37), generator=torch.Generator().manual_seed(1))

    def mixers(self):
        return [m for m in self.theirs.modules() if hasattr(m, "time_step_limit")]

    def clamped(self, clamp):
        """Theirs and ours with dt clamped nowhere ("never") or in prefill only, as transformers does."""
        for mixer, limit in zip(self.mixers(), self.untouched, strict=True):
            mixer.time_step_limit = limit if clamp == "prefill" else NO_CLAMP
        config = NemotronHConfig.from_pretrained(self.folder)
        assert config.clamp_time_step_min == "never"
        if clamp == "prefill":
            config = NemotronHConfig.from_pretrained(self.folder, clamp_time_step_min="prefill")
        return self.theirs, NemotronHForCausalLM.from_pretrained(self.folder, config=config)

    @torch.no_grad()
    def their_logits(self, **options):
        return self.theirs(self.ids, **options).logits


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Pair(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("clamp", ["never", "prefill"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_generation(name, clamp, pairs):
    pair = pairs(name)
    theirs, ours = pair.clamped(clamp)
    expected = pair.their_logits()
    assert expected.std() >= 1
    with torch.no_grad():
        assert difference(ours(pair.ids), expected) <= TOLERANCE
    everything = torch.ones_like(pair.ids)  # or their generate would take token 0 of the prompt for padding
    tokens = theirs.generate(pair.ids, attention_mask=everything, max_new_tokens=64, do_sample=False, pad_token_id=0)
    tokens = tokens[:, pair.ids.shape[1] :]
    assert len(tokens.unique()) > 8, "generation that repeats itself would prove little"
    generated = ours.generate(pair.ids, 64)
    assert generated.tolist() == tokens.tolist()

    # the logits behind those tokens: theirs and ours each fed token by token
    cache, past, logits = ours.new_cache(2), None, []
    for piece in (pair.ids, *tokens[:, :16].split(1, dim=1)):
        with torch.no_grad():
            output = theirs(piece, past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits.append(difference(ours(piece, cache=cache, last_only=True), output.logits[:, -1:]))
    assert max(logits) <= TOLERANCE


def test_the_clamp_matters(pairs):
    """Or the two runs above would be one."""
    pair = pairs("head-dim-80")
    _, ours = pair.clamped("never")
    pair.clamped("prefill")
    with torch.no_grad():
        assert difference(ours(pair.ids), pair.their_logits()) >= 1e-2


# not "biases": theirs lets in_proj's bias into padding
@pytest.mark.parametrize("name", ["head-dim-80", "twelve-heads-per-group", "moe-latent"])
def test_left_padding(name, pairs):
    pair = pairs(name)
    theirs, ours = pair.clamped("never")
    mask = torch.ones_like(pair.ids)
    mask[0, :9] = 0
    real = mask.bool()
    with torch.no_grad():
        assert difference(ours(pair.ids, attention_mask=mask)[real], pair.their_logits(attention_mask=mask)[real]) <= (
            TOLERANCE
        )
    tokens = theirs.generate(pair.ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert ours.generate(pair.ids, 24, attention_mask=mask).tolist() == tokens[:, pair.ids.shape[1] :].tolist()


def without_state(model):
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.A_log.fill_(20)  # exp(-exp(20) dt) = 0: nothing is carried from token to token


def without_d(model):
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.D.zero_()


def without_gate(model):
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.forward = functools.partial(ungated, module.forward)


def ungated(forward, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba2, "ssd_chunk_scan", lambda *tensors, z, **rest: ssd_chunk_scan(*tensors, **rest))
        return forward(*args, **kwargs)


def without_conv_history(model):
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.conv1d.weight[..., :-1] = 0


def without_one_attention_head(model):
    module = next(module for module in model.modules() if isinstance(module, Attention))
    module.o_proj.weight[:, -module.head_dim :] = 0


def without_one_expert(model):
    """The one that most tokens go to, in the first such layer."""
    module = next(module for module in model.modules() if isinstance(module, MoE))
    module.experts.down_proj[module.load.argmax()] = 0


def without_shared_expert(model):
    next(module for module in model.modules() if isinstance(module, MoE)).shared_experts.down_proj.weight.zero_()


def without_correction_bias(model):
    next(module for module in model.modules() if isinstance(module, MoE)).gate.e_score_correction_bias.zero_()


def without_scaling_factor(model):
    next(module for module in model.modules() if isinstance(module, MoE)).scaling_factor = 1.0


def other_renormalization(model):
    module = next(module for module in model.modules() if isinstance(module, MoE))
    module.renormalize = not module.renormalize


def without_groups(model):
    module = next(module for module in model.modules() if isinstance(module, MoE))
    module.num_groups = module.topk_groups = 1


def without_latent_projection(model):
    """The experts' results without what the last half of the latent features bring."""
    module = next(module for module in model.modules() if isinstance(module, MoE))
    module.fc2_latent_proj.weight[:, module.fc2_latent_proj.in_features // 2 :] = 0


MAMBA = [without_state, without_d, without_gate, without_conv_history, without_one_attention_head]
EXPERTS = [without_one_expert, without_shared_expert, without_correction_bias, without_scaling_factor]
WRONG = [
    *((name, mutate) for name in CONFIGS for mutate in MAMBA),
    *((name, mutate) for name in CONFIGS if name.startswith("moe") for mutate in (*EXPERTS, other_renormalization)),
    ("moe-groups", without_groups),
    ("moe-latent", without_latent_projection),
]


@pytest.mark.parametrize(("name", "mutate"), WRONG)
def test_wrong_models_are_rejected(name, mutate, pairs):
    pair = pairs(name)
    _, ours = pair.clamped("never")
    ours(pair.ids)  # counts the loads of the experts
    expected = pair.their_logits()
    with torch.no_grad():
        assert difference(ours(pair.ids), expected) <= TOLERANCE
        mutate(ours)
        assert difference(ours(pair.ids), expected) >= 1e-2


def test_transformers_reads_what_we_save(pairs, tmp_path):
    pair = pairs("biases")
    _, ours = pair.clamped("never")
    ours.save_pretrained(tmp_path, max_shard_bytes=20_000)
    again, report = transformers.NemotronHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.layers_block_type == pair.theirs.config.layers_block_type
    for mixer in (m for m in again.modules() if hasattr(m, "time_step_limit")):
        mixer.time_step_limit = NO_CLAMP
    with torch.no_grad():
        assert difference(again.eval()(pair.ids).logits, pair.their_logits()) == 0
