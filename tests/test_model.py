"""The hybrid model: against reference/model.py, at once or in pieces, batches or single sequences, training."""

import doctest
import itertools
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.models import PRESETS, HybridCache, NemotronHConfig, NemotronHForCausalLM, sample
from hybrid_ops.reference import model as reference

from .budget import to_numpy
from .random_models import COMMON, CONFIGS, redraw

# float64 results that differ in the order of sums only, on logits and states of order 1 to 100
EXACT = dict(rtol=1e-9, atol=1e-9)


def build(name, dtype=torch.float64, **changes):
    config = NemotronHConfig(**CONFIGS[name] | COMMON | changes)
    return redraw(NemotronHForCausalLM(config, dtype=dtype)).requires_grad_(False)


MODELS = {name: build(name) for name in CONFIGS}


def tokens(batch, seqlen, seed=1):
    return torch.randint(0, COMMON["vocab_size"], (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def remembered(cache):
    """Everything in a cache, as a list of tensors."""
    return [*cache.conv_states, *cache.ssm_states, *itertools.chain.from_iterable(cache.kv)]


def assert_same(cache, other, **tolerance):
    assert cache.lengths == other.lengths
    for mine, theirs in zip(remembered(cache), remembered(other), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


# the counts of the published models, embedding and output projection included
@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("nemotron-h-4b", 4_489_223_040),
        ("nemotron-h-8b", 8_100_852_736),
        ("nemotron-h-47b", 46_791_554_816),
        ("nemotron-h-56b", 56_324_350_464),
        ("nemotron-nano-9b-v2", 8_888_227_328),
        ("nemotron-nano-12b-v2", 12_310_001_152),
        ("nemotron-3-nano-4b", 3_973_556_832),
        ("nemotron-3-nano-30b", 31_577_940_288),
        ("nemotron-3.5-lightning-30b", 32_913_266_240),
        ("nemotron-3-super-120b", 123_611_033_088),
        ("nemotron-3-ultra-550b", 560_524_603_904),
        ("tiny", 738_824),
        ("tiny-moe", 1_171_640),
    ],
)
def test_parameter_counts(preset, count):
    model = NemotronHForCausalLM(NemotronHConfig.preset(preset), device="meta")
    assert sum(p.numel() for p in model.parameters()) == count


def test_every_preset_is_counted():
    counted = {case[0] for case in test_parameter_counts.pytestmark[0].args[1]}
    assert counted == set(PRESETS)


@pytest.mark.parametrize("name", CONFIGS)
def test_against_the_reference(name):
    """Logits and every state, prompt at once and then token by token, in float64."""
    model, ids = MODELS[name], tokens(2, 24)
    weights = {key: to_numpy(p) for key, p in model.named_parameters()}
    config = types.SimpleNamespace(**CONFIGS[name] | COMMON, layer_norm_epsilon=1e-5, time_step_limit=(0, math.inf))
    cache, states = model.new_cache(2), None
    torch.testing.assert_close(model(ids), torch.from_numpy(reference.forward(weights, config, ids)[0]), **EXACT)
    for piece in (ids[:, :21], *ids[:, 21:].split(1, dim=1)):
        logits, states = reference.forward(weights, config, piece, states=states)
        torch.testing.assert_close(model(piece, cache=cache), torch.from_numpy(logits), **EXACT)
        mamba = [s for s, letter in zip(states, config.hybrid_override_pattern, strict=True) if letter == "M"]
        attention = [s for s, letter in zip(states, config.hybrid_override_pattern, strict=True) if letter == "*"]
        for mine, (conv, ssm) in zip(zip(cache.conv_states, cache.ssm_states, strict=True), mamba, strict=True):
            torch.testing.assert_close(mine[0], torch.from_numpy(conv), **EXACT)
            torch.testing.assert_close(mine[1], torch.from_numpy(ssm), **EXACT)
        for mine, theirs in zip(cache.kv, attention, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, torch.from_numpy(b).transpose(1, 2), **EXACT)


@settings(max_examples=25)
@given(
    name=st.sampled_from(list(CONFIGS)),
    cuts=st.lists(st.sampled_from([1, 1, 2, 3, 7, 16, 17]), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_in_pieces(name, cuts, dtype):
    """Reading a prompt in any pieces gives the logits and leaves the states of reading it at once."""
    model = MODELS[name] if dtype == torch.float64 else build(name, dtype)
    # float32: sums in another order; the logits' allowance is that of the parity with transformers
    tolerance = EXACT if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4)
    ids = tokens(2, sum(cuts))
    whole, pieces = model.new_cache(2), model.new_cache(2)
    expected = model(ids, cache=whole)
    torch.testing.assert_close(model(ids), expected, **tolerance)
    got = torch.cat([model(piece, cache=pieces) for piece in ids.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(got, expected, **tolerance)
    assert_same(pieces, whole, **tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_after_every_token(name):
    """At once = in pieces = token by token, after each token and not only at the end."""
    model, ids = MODELS[name], tokens(1, 12)
    stepped, pieces = model.new_cache(1), model.new_cache(1)
    for n in range(1, 13):
        model(ids[:, n - 1 : n], cache=stepped)
        whole = model.new_cache(1)
        model(ids[:, :n], cache=whole)
        assert_same(stepped, whole, **EXACT)
        if n % 4 == 0:
            model(ids[:, n - 4 : n], cache=pieces)
            assert_same(pieces, whole, **EXACT)


def alone(model, sequences):
    """Each sequence by itself: logits of all tokens, and the logits after 2 further tokens."""
    results = []
    for ids in sequences:
        cache = model.new_cache(1)
        logits = model(ids[None], cache=cache)[0]
        results.append((logits, [model(torch.tensor([[t]]), cache=cache)[0, 0] for t in (5, 6)]))
    return results


def continue_together(model, cache, expected, present):
    """Two further tokens for all rows, each as alone."""
    for step, token in enumerate((5, 6)):
        logits = model(torch.full((cache.batch_size, 1), token), cache=cache)[:, 0]
        for row in present:
            torch.testing.assert_close(logits[row], expected[row][1][step], **EXACT)


@settings(max_examples=12)
@given(
    name=st.sampled_from(list(CONFIGS)),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    left=st.booleans(),
)
def test_padded_batch(name, lengths, left):
    """A row of a padded batch is what the sequence is alone, whatever stands in the padding."""
    model, longest = MODELS[name], max(lengths)
    sequences = [tokens(1, n, seed=i)[0] for i, n in enumerate(lengths)]
    ids, mask = tokens(len(lengths), longest, seed=99), torch.zeros(len(lengths), longest, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        where = slice(longest - len(sequence), None) if left else slice(len(sequence))
        ids[row, where], mask[row, where] = sequence, 1
    expected = alone(model, sequences)
    cache = model.new_cache(len(lengths))
    logits = model(ids, cache=cache, attention_mask=mask)
    assert (logits[mask == 0] == 0).all()
    for row, (own, _) in enumerate(expected):
        torch.testing.assert_close(logits[row][mask[row] == 1], own, **EXACT)
    continue_together(model, cache, expected, range(len(lengths)))


@settings(max_examples=12)
@given(name=st.sampled_from(list(CONFIGS)), lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_packed(name, lengths):
    """Packed sequences, empty ones among them, read in two calls: each is what it is alone."""
    model = MODELS[name]
    sequences = [tokens(1, n, seed=i)[0] for i, n in enumerate(lengths)]
    expected = alone(model, sequences)
    cache = model.new_cache(len(lengths))
    got = [[] for _ in lengths]
    for half in (lambda n: slice(0, n // 2), lambda n: slice(n // 2, None)):
        pieces = [sequence[half(len(sequence))] for sequence in sequences]
        bounds = torch.tensor([0, *itertools.accumulate(map(len, pieces))], dtype=torch.int32)
        logits = model(torch.cat(pieces)[None], cache=cache, cu_seqlens=bounds)[0]
        for own, part in zip(got, logits.split([len(p) for p in pieces]), strict=True):
            own.append(part)
    for own, (logits, _) in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.cat(own), logits, **EXACT)
    if all(lengths):
        continue_together(model, cache, expected, range(len(lengths)))


def test_ragged_cache_reads_a_longer_piece():
    """Sequences of different lengths in one cache go on by several tokens at once."""
    model, ids = MODELS["head-dim-80"], tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    at_once, stepped = model.new_cache(2), model.new_cache(2)
    for cache in (at_once, stepped):
        model(ids, cache=cache, attention_mask=mask)
    more = tokens(2, 6, seed=3)
    expected = torch.cat([model(piece, cache=stepped) for piece in more.split(1, dim=1)], dim=1)
    torch.testing.assert_close(model(more, cache=at_once), expected, **EXACT)
    assert at_once.lengths == [13, 18]


def test_nothing_to_read():
    model = MODELS["biases"]
    cache = model.new_cache(2)
    assert model(tokens(2, 0), cache=cache).shape == (2, 0, 96)
    assert cache.lengths == [0, 0]
    assert not any(t.any() for t in remembered(cache))
    assert model(tokens(0, 3), cache=model.new_cache(0)).shape == (0, 3, 96)
    assert model(tokens(1, 0), cu_seqlens=torch.zeros(1, dtype=torch.int32)).shape == (1, 0, 96)
    assert not model(tokens(2, 4), attention_mask=torch.zeros(2, 4, dtype=torch.bool)).any()
    assert model.generate(tokens(0, 3), 2).shape == (0, 2)


@pytest.mark.parametrize(("state", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_small_states(state, error):
    """SSM states of 16 bits between calls cost their rounding, seen once per call of five, and no more."""
    model = build("twelve-heads-per-group", torch.float32)
    low = NemotronHForCausalLM(
        NemotronHConfig(**CONFIGS["twelve-heads-per-group"] | COMMON, mamba_ssm_cache_dtype=state)
    )
    low.load_state_dict(model.state_dict())
    ids = tokens(2, 20)
    expected, cache = model(ids), low.new_cache(2)
    got = torch.cat([low(piece, cache=cache) for piece in ids.split([9, 8, 1, 1, 1], dim=1)], dim=1)
    difference = (got - expected).std() / expected.std()
    assert 0 < difference <= error


@pytest.mark.usefixtures("compile_once")  # keeps torch's own new_empty, which dynamo can trace
def test_compiles():
    """The forward is one graph for every length."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = build("moe-latent", torch.float32, hybrid_override_pattern="M*-E")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length in (9, 17, 33):
        ids = tokens(2, length)
        torch.testing.assert_close(compiled(ids), model(ids))
        if length == 9:
            graphs = counter.frame_count  # the first call may trace again
    assert counter.frame_count == graphs


def test_last_only():
    model, ids = MODELS["biases"], tokens(2, 9)
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:], **EXACT)
    bounds = torch.tensor([0, 4, 18], dtype=torch.int32)
    packed = ids.reshape(1, -1)
    got = model(packed, cu_seqlens=bounds, last_only=True)
    torch.testing.assert_close(got[:, 0], model(packed, cu_seqlens=bounds)[0, [3, 17]], **EXACT)


def test_cache():
    model, ids = MODELS["head-dim-80"], tokens(2, 5)
    cache = model.new_cache(2, max_length=6)
    first = model(ids, cache=cache)
    assert cache.nbytes()["kv"] == 2 * 2 * 5 * 2 * 16 * 8  # k and v, sequences, tokens, heads, head_dim, bytes
    assert cache.nbytes()["ssm"] == 2 * 2 * 4 * 80 * 16 * 8
    for _ in range(10):  # past max_length: grows
        model(ids[:, :1], cache=cache)
    cache.reset()
    assert cache.nbytes()["kv"] == 0
    torch.testing.assert_close(model(ids, cache=cache), first, **EXACT)
    half = NemotronHConfig(**CONFIGS["biases"] | COMMON, mamba_ssm_cache_dtype="float16")
    assert {t.dtype for t in HybridCache(half, 1).ssm_states} == {torch.float16}
    assert HybridCache(half, 1, dtype=torch.bfloat16).conv_states[0].dtype == torch.bfloat16


# with experts all of them: which ones the router takes would jump where scores are close
LOW_PRECISION = [("twelve-heads-per-group", {}), ("moe", dict(num_experts_per_tok=8))]


def check_low_precision(name, changes, dtype, device="cpu"):
    """Parameters that steer state and choice stay float32; the rest of the arithmetic loses what 16 bits lose."""
    model = build(name, torch.float32, **changes)
    low = NemotronHForCausalLM(model.config, dtype=dtype).requires_grad_(False)
    low.load_state_dict(model.state_dict())
    own = {"A_log", "D", "dt_bias"} | ({"e_score_correction_bias"} if changes else set())
    assert {n.split(".")[-1] for n, p in low.named_parameters() if p.dtype == torch.float32} == own
    model.load_state_dict(low.state_dict())  # the same rounded weights
    ids = tokens(2, 20)
    low.to(device)
    cache = low.new_cache(2)
    got = torch.cat([low(piece.to(device), cache=cache) for piece in ids.split([9, 8, 1, 1, 1], dim=1)], dim=1).cpu()
    assert got.dtype == torch.float32
    # four layers with a dozen roundings each, uncorrelated: sqrt(48) half-ulps
    expected = model(ids)
    assert (got - expected).std() <= math.sqrt(48) * torch.finfo(dtype).eps * expected.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "changes"), LOW_PRECISION)
def test_low_precision(name, changes, dtype):
    check_low_precision(name, changes, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "changes"), LOW_PRECISION)
def test_low_precision_gpu(name, changes, dtype):
    check_low_precision(name, changes, dtype, "cuda")


def test_residual_in_fp32():
    model = build("biases", torch.bfloat16, residual_in_fp32=True)
    seen = []
    model.backbone.layers[1].register_forward_hook(lambda module, arguments, result: seen.append(result))
    model(tokens(1, 4))
    assert [t.dtype for t in seen[0]] == [torch.bfloat16, torch.float32]


def test_time_step_limits():
    ids = tokens(1, 12)
    base = MODELS["head-dim-80"]

    def logits(by_token=False, **changes):
        model = NemotronHForCausalLM(NemotronHConfig(**CONFIGS["head-dim-80"] | COMMON, **changes), dtype=torch.float64)
        model.load_state_dict(base.state_dict())
        if not by_token:
            return model(ids).detach()
        cache = model.new_cache(1)
        return torch.cat([model(piece, cache=cache) for piece in ids.split(1, dim=1)], dim=1)

    free = base(ids)
    assert (logits(clamp_time_step_min="prefill") - free).abs().max() > 1e-3
    everywhere = logits(clamp_time_step_min="always")
    torch.testing.assert_close(everywhere, logits(clamp_time_step_min="prefill"), **EXACT)
    torch.testing.assert_close(everywhere, logits(time_step_limit=(0.001, math.inf)), **EXACT)
    torch.testing.assert_close(everywhere, logits(True, clamp_time_step_min="always"), **EXACT)
    # token by token, only the first token is a prefill
    assert (logits(True, clamp_time_step_min="prefill") - everywhere).abs().max() > 1e-3


def test_generate():
    model, ids = MODELS["head-dim-80"], tokens(2, 7)
    got = model.generate(ids, 12)
    assert got.shape == (2, 12)
    read = ids
    for step in range(12):  # without any cache
        best = model(read)[:, -1].argmax(-1)
        assert best.tolist() == got[:, step].tolist()
        read = torch.cat([read, best[:, None]], dim=1)
    assert torch.stack(list(model.stream(ids, 12)), dim=1).equal(got)
    steps = []
    model.generate(ids, 12, callback=steps.append)
    assert torch.stack(steps, dim=1).equal(got)
    assert model.generate(ids, 0).shape == (2, 0)

    rows = [ids[0], ids[1, 3:]]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = torch.cat([model.generate(row[None], 12) for row in rows])
    assert model.generate(ids, 12, attention_mask=mask).equal(expected)
    bounds = torch.tensor([0, 7, 11], dtype=torch.int32)
    assert model.generate(torch.cat(rows)[None], 12, cu_seqlens=bounds).equal(expected)


def test_generation_ends():
    model, ids = MODELS["head-dim-80"], tokens(2, 7)
    free = model.generate(ids, 20)
    end = int(free[0, 4])
    first = [row.index(end) if end in row else 20 for row in free.tolist()]
    got = model.generate(ids, 20, eos_token_id=end)
    assert got.shape[1] == min(20, max(first) + 1)
    for row in range(2):
        kept = min(first[row] + 1, got.shape[1])
        assert got[row, :kept].equal(free[row, :kept])
        assert (got[row, kept:] == 0).all()
    both = [int(free[0, 2]), int(free[1, 3])]
    assert model.generate(ids, 20, eos_token_id=both).shape[1] <= 4
    config = NemotronHConfig(**CONFIGS["head-dim-80"] | COMMON | dict(eos_token_id=both))
    ending = NemotronHForCausalLM(config, dtype=torch.float64)
    ending.load_state_dict(model.state_dict())
    assert ending.generate(ids, 20).equal(model.generate(ids, 20, eos_token_id=both))
    assert ending.generate(ids, 20, eos_token_id=None).equal(free)


def test_sampling():
    model, ids = MODELS["head-dim-80"], tokens(2, 7)

    def draw(seed, **options):
        return model.generate(ids, 6, do_sample=True, generator=torch.Generator().manual_seed(seed), **options)

    assert draw(0).equal(draw(0))
    assert not draw(0).equal(draw(1))
    greedy = model.generate(ids, 6)
    assert draw(0, top_k=1).equal(greedy)
    assert draw(0, top_p=1e-6).equal(greedy)
    assert draw(0, temperature=1e-6).equal(greedy)


def test_sample_follows_the_distribution():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        drawn = sample(logits.expand(20000, 4), generator=generator, **options)
        return torch.bincount(drawn, minlength=4) / 20000

    def close(got, expected):
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=0.015)  # four standard deviations

    close(frequencies(), [0.5, 0.25, 0.15, 0.1])
    close(frequencies(top_k=2), [2 / 3, 1 / 3, 0.0, 0.0])
    close(frequencies(top_p=0.7), [2 / 3, 1 / 3, 0.0, 0.0])
    close(frequencies(top_p=0.76), [5 / 9, 2.5 / 9, 1.5 / 9, 0.0])
    squares = torch.tensor([0.25, 0.0625, 0.0225, 0.01])
    close(frequencies(temperature=0.5), (squares / squares.sum()).tolist())


@pytest.mark.parametrize(
    ("name", "packed"),
    [("head-dim-80", False), ("twelve-heads-per-group", False), ("biases", True), ("moe", True), ("moe-latent", False)],
)
def test_gradients(name, packed):
    """The derivative along a random direction of every kind of parameter is what two evaluations say."""
    model = build(name).requires_grad_()
    ids = tokens(1, 23)
    options = dict(cu_seqlens=torch.tensor([0, 9, 9, 23], dtype=torch.int32)) if packed else {}

    def loss():
        return F.cross_entropy(model(ids, **options)[0, :-1], ids[0, 1:])

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    kinds = {}
    for key, parameter in model.named_parameters():
        if key.endswith("e_score_correction_bias"):  # has no part in the loss
            assert parameter.grad is None
            continue
        assert parameter.grad.abs().max() > 0, key
        kinds.setdefault(key.split("layers.")[-1].split(".", 1)[-1], []).append(parameter)
    for kind, parameters in kinds.items():
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True))
        values = []
        with torch.no_grad():
            for step in (1e-6, -1e-6):
                for p, d in zip(parameters, directions, strict=True):
                    p += step * d
                values.append(loss().item())
                for p, d in zip(parameters, directions, strict=True):
                    p -= step * d
        measured = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx(measured, rel=1e-4, abs=1e-7), kind  # rounding 1e-16 / 1e-6, curvature 1e-12


def test_training():
    """From its initialisation the model starts at the loss of a uniform guess and learns a repeating text."""
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig.preset("tiny"))
    ids = torch.randint(0, 256, (1, 16)).repeat(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(256), abs=0.2)
    assert losses[-1] < 0.5 * losses[0]


def test_a_cache_records_no_gradient():
    model = build("biases").requires_grad_()
    assert model(tokens(1, 4)).requires_grad
    assert not model(tokens(1, 4), cache=model.new_cache(1)).requires_grad


def test_warmup():
    model = build("biases")
    before = [p.clone() for p in model.parameters()]
    hybrid_ops.warmup(model)
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(input_ids=torch.zeros(3, dtype=torch.int64)), ValueError, r"input_ids must have shape \(batch, seqlen\)"),
        (dict(input_ids=torch.zeros(1, 3)), TypeError, "input_ids must have dtype int64 or int32, got float32"),
        (dict(input_ids=torch.tensor([[3, 96]])), ValueError, r"input_ids must be in \[0, 96\), got 96"),
        (dict(input_ids=torch.tensor([[3, -1]])), ValueError, r"input_ids must be in \[0, 96\), got -1"),
        (dict(attention_mask=torch.ones(2, 4).long()), ValueError, r"attention_mask must have shape \(2, 5\)"),
        (dict(attention_mask=torch.ones(2, 5)), TypeError, "attention_mask must have dtype bool or int64"),
        (dict(cu_seqlens=torch.tensor([0, 5]).int()), ValueError, r"input_ids must have shape \(1, \*\), got \(2, 5\)"),
        (
            dict(input_ids=tokens(1, 5), cu_seqlens=torch.tensor([0, 4]).int()),
            ValueError,
            "cu_seqlens must end at the number of tokens, 5, got 4",
        ),
        (
            dict(attention_mask=torch.ones(2, 5).bool(), cu_seqlens=torch.tensor([0, 5]).int()),
            ValueError,
            "at most one of cu_seqlens, attention_mask",
        ),
        (dict(cache=MODELS["biases"].new_cache(3)), ValueError, "cache must hold 2 sequences, got 3"),
        (dict(input_ids=tokens(2, 0), last_only=True), ValueError, "input_ids must have .* got none of sequence 0"),
        (
            dict(attention_mask=torch.tensor([[1] * 5, [0] * 5]), last_only=True),
            ValueError,
            "input_ids must have .* got none of sequence 1",
        ),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(input_ids=tokens(2, 5)) | change
    with pytest.raises(error, match=message):
        MODELS["biases"](arguments.pop("input_ids"), **arguments)
    if "cache" in change:
        assert change["cache"].lengths == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens must be an integer >= 0, got -1"),
        (dict(temperature=0.0), "temperature must be > 0, got 0.0"),
        (dict(top_k=0), "top_k must be >= 1, got 0"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
        (dict(eos_token_id="end"), "eos_token_id must be an integer, several, None or 'config', got 'end'"),
    ],
)
def test_bad_generation(options, message):
    with pytest.raises(ValueError, match=message):
        MODELS["biases"].generate(tokens(1, 4), **dict(max_new_tokens=2) | options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_gpu(name):
    """The kernels in the model: logits as on the CPU, and the same continuation."""
    model = build(name, torch.float32)
    ids = tokens(2, 37)
    expected, generated = model(ids), model.generate(ids, 16)
    model.cuda()
    hybrid_ops.warmup(model)
    torch.testing.assert_close(model(ids.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)  # as for transformers
    assert model.generate(ids.cuda(), 16).cpu().equal(generated)
    cache = model.new_cache(2)
    pieces = [model(piece, cache=cache) for piece in ids.cuda().split([19, 16, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1).cpu(), expected, rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    padded = model(ids.cuda(), attention_mask=mask.cuda(), cache=model.new_cache(2)).cpu()
    torch.testing.assert_close(padded[0, 9:], model(ids[:1, 9:].cuda())[0].cpu(), rtol=1e-4, atol=1e-4)


def test_reference_rejects_other_layers():
    config = types.SimpleNamespace(hybrid_override_pattern="?", layer_norm_epsilon=1e-5, time_step_limit=(0, math.inf))
    weights = {"backbone.embeddings.weight": np.ones((4, 2)), "backbone.layers.0.norm.weight": np.ones(2)}
    with pytest.raises(ValueError, match="layer 0 of the pattern must be"):
        reference.forward(weights, config, [[1]])


def test_examples():
    """The docs page and every docstring of the models and modules."""
    names = dict(torch=torch, hybrid_ops=hybrid_ops)
    page = Path(__file__).parent.parent / "docs" / "model.md"
    results = [doctest.testfile(str(page), module_relative=False, globs=dict(names))]
    finder = doctest.DocTestFinder(recurse=False)
    for module in (hybrid_ops.models, hybrid_ops.nn):
        for public in module.__all__:
            for example in finder.find(getattr(module, public), public, globs=dict(names)):
                results.append(doctest.DocTestRunner().run(example))
    assert sum(result.attempted for result in results) > 25
    assert not any(result.failed for result in results)
