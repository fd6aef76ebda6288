"""The multi-token prediction head: against reference/model.py, in training, drafting, and generation with drafts."""

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.models import HybridCache, NemotronHConfig, NemotronHForCausalLM, speculate
from hybrid_ops.reference import model as reference

from .budget import to_numpy
from .random_models import COMMON, CONFIGS, MTP_CONFIGS, redraw
from .test_model import EXACT, assert_same, tokens


def build(name, dtype=torch.float64, **changes):
    config = NemotronHConfig(**MTP_CONFIGS[name] | COMMON | changes)
    return redraw(NemotronHForCausalLM(config, dtype=dtype)).requires_grad_(False)


MODELS = {name: build(name) for name in MTP_CONFIGS}


def oracle(model):
    return {name: to_numpy(p) for name, p in model.named_parameters()}, model.config


def agree(mine, theirs):
    torch.testing.assert_close(mine, torch.from_numpy(theirs), **EXACT)


@pytest.mark.parametrize("name", MTP_CONFIGS)
def test_against_the_reference(name):
    """Logits, hidden states and the head at three depths, in float64."""
    model, ids = MODELS[name], tokens(2, 12)
    weights, config = oracle(model)
    h, _ = reference.backbone(weights, config, ids)
    logits, hidden = model(ids, return_hidden=True)
    agree(hidden, h)
    agree(logits, reference.forward(weights, config, ids)[0])
    again, further = model(ids, mtp_depth=3)
    assert again.equal(logits)
    for depth, mine in enumerate(further, start=1):
        theirs, h, _ = reference.mtp(weights, config, h[:, :-1], ids[:, depth:])
        agree(mine, theirs)
    # the same as one call of the module for each depth
    embedded = model.backbone.embeddings(ids[:, 1:])
    torch.testing.assert_close(model._project(model.mtp(embedded, hidden[:, :-1])), further[0], **EXACT)


@pytest.mark.parametrize("name", MTP_CONFIGS)
def test_drafts_against_the_reference(name):
    """Prompt, drafts, more tokens, drafts again: every guess is the reference's with its own keys and values."""
    model, ids = MODELS[name], tokens(2, 11)
    weights, config = oracle(model)
    hidden = model(ids, return_hidden=True)[1]
    cache, states = model.new_cache(2, mtp=True), None
    for start, end in ((0, 6), (6, 7), (7, 10)):
        drafts = model.draft(hidden[:, start:end], ids[:, start + 1 : end + 1], 4, cache)
        logits, h, states = reference.mtp(
            weights, config, to_numpy(hidden[:, start:end]), ids[:, start + 1 : end + 1], states=states
        )
        assert cache.lengths == [end, end]
        for mine, (k, v) in zip(cache.kv, [s for s in states if s is not None], strict=True):
            agree(mine[0].transpose(1, 2), k)
            agree(mine[1].transpose(1, 2), v)
        after = states  # what drafts add is forgotten
        for column in range(4):
            guess = logits[:, -1].argmax(-1)
            assert drafts[:, column].tolist() == guess.tolist()
            logits, h, after = reference.mtp(weights, config, h[:, -1:], guess[:, None], states=after)


def test_draft_of_ragged_sequences():
    """Of what is handed over, each sequence has its own count; the rest leaves no trace."""
    model, ids = MODELS["mtp"], tokens(3, 9)
    hidden = model(ids, return_hidden=True)[1]
    together = model.new_cache(3, mtp=True)
    alone = [model.new_cache(1, mtp=True) for _ in range(3)]
    for counts, start in (([4, 1, 2], 0), ([2, 3, 1], 4)):
        pieces = hidden[:, start : start + 4], ids[:, start + 1 : start + 5]
        got = model.draft(*pieces, 3, together, counts=counts)
        for row, count in enumerate(counts):
            own = [piece[row : row + 1, :count] for piece in pieces]
            assert got[row].tolist() == model.draft(*own, 3, alone[row])[0].tolist()
    assert together.lengths == [6, 4, 3]
    for row, cache in enumerate(alone):
        for mine, theirs in zip(together.kv[0], cache.kv[0], strict=True):
            torch.testing.assert_close(mine[row, :, : cache.lengths[0]], theirs[0], **EXACT)
    assert model.draft(hidden[:, 8:], ids[:, 8:], 0, together).shape == (3, 0)


@pytest.mark.parametrize("name", ["mtp", "puzzle"])
def test_packed(name):
    """Packed sequences, short and empty ones among them: the head's logits are those of each alone."""
    model, lengths = MODELS[name], [5, 0, 1, 2, 7]
    sequences = [tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    _, further = model(torch.cat(sequences, dim=1), cu_seqlens=bounds, mtp_depth=2)
    for depth, got in enumerate(further, start=1):
        shorter = [max(n - depth, 0) for n in lengths]
        for own, part, n in zip(sequences, got[0].split(shorter), lengths, strict=True):
            if n > depth:
                torch.testing.assert_close(part, model(own, mtp_depth=depth)[1][-1][0], **EXACT)


def test_hidden_of_a_padded_batch():
    model, ids = MODELS["mtp"], tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    _, hidden = model(ids, attention_mask=mask, return_hidden=True)
    assert not hidden[0, :4].any()
    torch.testing.assert_close(hidden[0, 4:], model(ids[:1, 4:], return_hidden=True)[1][0], **EXACT)
    logits, hidden = model(ids, attention_mask=mask, return_hidden=True, last_only=True)
    assert (logits.shape, hidden.shape) == ((2, 1, 96), (2, 9, 48))


@pytest.mark.parametrize("name", MTP_CONFIGS)
def test_gradients(name):
    """The derivative of the head's loss along a random direction of every parameter of it, and of what it shares."""
    model, ids = build(name).requires_grad_(), tokens(2, 9)

    def loss():
        _, further = model(ids, mtp_depth=2)
        return sum(
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, depth + 1 :].flatten())
            for depth, logits in enumerate(further, start=1)
        )

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if key.endswith("e_score_correction_bias"):
            continue
        assert parameter.grad.abs().max() > 0, key
        if not key.startswith("mtp.") and "embeddings" not in key:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                parameter += step * direction
                values.append(loss().item())
            parameter += 1e-6 * direction
        slope = (parameter.grad * direction).sum().item()
        # rounding 1e-15 / 1e-6, curvature 1e-12
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7), key


def test_training():
    """The head learns a repeating text, at every depth, and its drafts are then what the model goes on with."""
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig.preset("tiny-moe"))
    ids = torch.randint(0, 256, (1, 16)).repeat(4, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    losses = []
    for _ in range(32):
        logits, further = model(ids, mtp_depth=2)
        each = [
            F.cross_entropy(some[:, :-1].flatten(0, 1), ids[:, depth + 1 :].flatten())
            for depth, some in enumerate([logits, *further])
        ]
        optimizer.zero_grad()
        sum(each).backward()
        optimizer.step()
        losses.append([loss.item() for loss in each])
    assert losses[0] == pytest.approx([math.log(256)] * 3, abs=0.2)
    assert all(last < 0.1 * first for first, last in zip(losses[0], losses[-1], strict=True))
    result = speculate(model, ids[:1, :20], 40, num_draft_tokens=3)
    assert min(result.acceptance) > 0.8
    assert result.tokens.equal(model.generate(ids[:1, :20], 40))


@pytest.mark.usefixtures("compile_once")  # keeps torch's own new_empty, which dynamo can trace
def test_compiles():
    """The training forward with the head is one graph for every length."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = build("mtp", torch.float32, hybrid_override_pattern="-")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length in (9, 17, 33):
        ids = tokens(2, length)
        torch.testing.assert_close(compiled(ids, mtp_depth=1), model(ids, mtp_depth=1))
        if length == 9:
            graphs = counter.frame_count  # the first call may trace again
    assert counter.frame_count == graphs


@settings(max_examples=30)
@given(
    name=st.sampled_from([*MTP_CONFIGS, "head-dim-80", "biases"]),
    drafts=st.integers(1, 4),
    rounds=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
)
def test_rejected_tokens_leave_no_trace(name, drafts, rounds):
    """After `accept`, a cache holds and continues what it would, had only those tokens come."""
    model = MODELS[name] if name in MODELS else CACHED.setdefault(name, plain(name))
    caches = [model.new_cache(1) for _ in range(2)]
    together = model.new_cache(2, num_draft_tokens=drafts)
    prompt = tokens(2, 7)
    model(prompt, cache=together)
    for row, cache in enumerate(caches):
        model(prompt[row : row + 1], cache=cache)
    for seed, (length, first, second) in enumerate(rounds):
        length = min(length, drafts + 1)
        counts = [min(first, length), min(second, length)]
        piece = tokens(2, length, seed=seed)
        logits = model(piece, cache=together)
        together.accept(counts)
        assert together.lengths == [cache.lengths[0] + count for cache, count in zip(caches, counts, strict=True)]
        for row, (cache, count) in enumerate(zip(caches, counts, strict=True)):
            own = torch.cat([model(t, cache=cache) for t in piece[row : row + 1, :count].split(1, dim=1)], dim=1)
            torch.testing.assert_close(logits[row, :count], own[0], **EXACT)
            for mine, theirs in (
                *zip(together.conv_states, cache.conv_states, strict=True),
                *zip(together.ssm_states, cache.ssm_states, strict=True),
            ):
                torch.testing.assert_close(mine[row], theirs[0], **EXACT)
            for mine, theirs in zip(together.kv, cache.kv, strict=True):
                torch.testing.assert_close(mine[0][row, :, : cache.lengths[0]], theirs[0][0], **EXACT)


def plain(name):
    return redraw(NemotronHForCausalLM(NemotronHConfig(**CONFIGS[name] | COMMON), dtype=torch.float64)).requires_grad_(
        False
    )


CACHED = {}


def test_a_cache_with_drafts_starts_again():
    model, ids = MODELS["mtp"], tokens(1, 6)
    cache, fresh = model.new_cache(1, num_draft_tokens=2), model.new_cache(1)
    model(ids, cache=cache)
    model(ids[:, :3], cache=cache)
    cache.accept([1])
    cache.reset()
    for piece in (ids, ids[:, :1]):
        assert model(piece, cache=cache).equal(model(piece, cache=fresh))
    assert_same(cache, fresh, **EXACT)


class Guesser:
    """Stands in for `model.draft`: the true continuation, wrong at chosen positions."""

    def __init__(self, truth, wrong):
        self.truth, self.wrong, self.round = truth, wrong, 0

    def __call__(self, hidden, next_ids, num_tokens, cache, *, counts=None):
        cache.advance([hidden.shape[1]] * len(counts))
        cache.truncate([c - hidden.shape[1] + n for c, n in zip(cache.lengths, counts, strict=True)])
        self.round += 1
        rows = []
        for row, text in enumerate(self.truth.tolist()):
            seen = cache.lengths[row] - PROMPT + 1  # tokens made so far
            guess = (text[seen:] + [1] * num_tokens)[:num_tokens]
            rows.append([(g + 1) % 96 if self.wrong(row, self.round, j) else g for j, g in enumerate(guess)])
        return torch.tensor(rows)


PROMPT = 5


@settings(max_examples=25)
@given(name=st.sampled_from(list(MTP_CONFIGS)), drafts=st.integers(1, 5), seed=st.integers(0, 99), n=st.integers(0, 14))
def test_any_drafts_give_the_greedy_tokens(name, drafts, seed, n):
    """Drafts right and wrong in every combination, two sequences apart in how far they are."""
    model, ids = MODELS[name], tokens(2, PROMPT, seed=seed)
    truth = model.generate(ids, 20)
    right = [
        [torch.randint(0, 3, (drafts,), generator=torch.Generator().manual_seed(97 * seed + 20 * row + round)).tolist()
         for round in range(20)]
        for row in range(2)
    ]  # fmt: skip
    model.draft = Guesser(truth, lambda row, round, j: right[row][round][j] == 0)
    try:
        result = speculate(model, ids, n, num_draft_tokens=drafts)
    finally:
        del model.draft
    assert result.tokens.equal(truth[:, :n])
    assert all(0 <= a <= d for a, d in zip(result.accepted, result.drafted, strict=True))
    assert result.accepted == sorted(result.accepted, reverse=True)


@pytest.mark.parametrize("name", MTP_CONFIGS)
@pytest.mark.parametrize("drafts", [1, 3])
def test_generate(name, drafts):
    """The head's own drafts: the tokens of plain greedy decoding, for batches, padded and packed ones too."""
    model, ids = MODELS[name], tokens(2, 7)
    expected = model.generate(ids, 24)
    assert model.generate(ids, 24, num_draft_tokens=drafts).equal(expected)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = model.generate(ids, 24, attention_mask=mask)
    assert model.generate(ids, 24, attention_mask=mask, num_draft_tokens=drafts).equal(expected)
    packed = torch.cat([ids[0], ids[1, 3:]])[None]
    bounds = torch.tensor([0, 7, 11], dtype=torch.int32)
    assert model.generate(packed, 24, cu_seqlens=bounds, num_draft_tokens=drafts).equal(expected)
    assert model.generate(ids, 0, num_draft_tokens=drafts).shape == (2, 0)
    end = int(expected[0, 9])
    options = dict(attention_mask=mask, eos_token_id=end)
    assert model.generate(ids, 24, num_draft_tokens=drafts, **options).equal(model.generate(ids, 24, **options))


def test_acceptance():
    """Drafts that are always right, never right, and right in the first place only."""
    model, ids = MODELS["mtp"], tokens(2, PROMPT)
    truth = model.generate(ids, 30)
    for wrong, drafted, accepted in (
        (lambda row, round, j: False, 2 * 5, [10, 10, 10]),  # 1 + 5 rounds of 4
        (lambda row, round, j: True, 2 * 20, [0, 0, 0]),
        (lambda row, round, j: j == 1, 2 * 10, [20, 0, 0]),
    ):
        model.draft = Guesser(truth, wrong)
        result = speculate(model, ids, 21, num_draft_tokens=3)
        del model.draft
        assert result.tokens.equal(truth[:, :21])
        assert result.drafted == [drafted] * 3
        assert result.accepted == accepted
        assert result.acceptance == [a / drafted for a in accepted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    """Below float64 a pass over several tokens rounds otherwise, but not more, than one token after the other does."""
    model = build("mtp-latent", dtype)
    ids = tokens(2, 9)
    stepped, at_once = model.new_cache(2), model.new_cache(2, num_draft_tokens=3)
    for cache in (stepped, at_once):
        model(ids[:, :5], cache=cache)
    one_by_one = torch.cat([model(piece, cache=stepped) for piece in ids[:, 5:].split(1, dim=1)], dim=1)
    got = model(ids[:, 5:], cache=at_once)
    exact = MODELS["mtp-latent"](ids)[:, 5:].float()
    assert (got - exact).std() <= 2 * (one_by_one - exact).std()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m(tokens(1, 4), mtp_depth=-1), "mtp_depth must be an integer >= 0, got -1"),
        (lambda m, c: m(tokens(1, 4), mtp_depth=1, cache=c), "at most one of mtp_depth, .* got mtp_depth and cache"),
        (lambda m, c: m(tokens(1, 4), mtp_depth=1, return_hidden=True), "got mtp_depth and return_hidden"),
        (
            lambda m, c: m(tokens(1, 4), mtp_depth=1, attention_mask=torch.ones(1, 4).bool()),
            "got mtp_depth and attention_mask",
        ),
        (lambda m, c: plain("biases")(tokens(1, 4), mtp_depth=1), "mtp_depth must be 0 in a model with num_nextn"),
        (lambda m, c: c.accept([1]), "accept is for a cache with num_draft_tokens >= 1, got one with 0"),
        (lambda m, c: c.truncate([0]), "truncate is for a cache without Mamba-2 layers"),
        (lambda m, c: m.new_cache(2, mtp=True).truncate([1, 0]), r"lengths must be at most .*\[0, 0\], got \[1, 0\]"),
        (lambda m, c: HybridCache(m.config, 1, num_draft_tokens=-1), "num_draft_tokens must be >= 0, got -1"),
        (lambda m, c: m.generate(tokens(1, 4), 2, num_draft_tokens=-1), "num_draft_tokens must be an integer >= 1"),
        (lambda m, c: m.generate(tokens(1, 4), -2, num_draft_tokens=1), "max_new_tokens must be an integer >= 0"),
        (lambda m, c: m.generate(tokens(1, 4), 2, num_draft_tokens=1, do_sample=True), "num_draft_tokens must be 0"),
        (lambda m, c: plain("biases").generate(tokens(1, 4), 2, num_draft_tokens=1), "num_draft_tokens is for a model"),
        (
            lambda m, c: m.draft(torch.zeros(1, 2, 47).double(), tokens(1, 2), 1, m.new_cache(1, mtp=True)),
            r"hidden must have shape \(1, 2, 48\)",
        ),
        (
            lambda m, c: m.draft(torch.zeros(1, 2, 48).double(), tokens(1, 2), 1, m.new_cache(2, mtp=True)),
            "cache must hold 1 sequences, got 2",
        ),
        (
            lambda m, c: m.draft(torch.zeros(1, 2, 48).double(), tokens(1, 2), 1, m.new_cache(1, mtp=True), counts=[3]),
            r"counts must be 1 numbers from 1 to 2, got \[3\]",
        ),
        (
            lambda m, c: plain("biases").draft(torch.zeros(1, 2, 40).double(), tokens(1, 2), 1, c),
            "draft is for a model with num_nextn_predict_layers=1",
        ),
    ],
)
def test_bad_calls(call, message):
    model = MODELS["mtp"]
    with pytest.raises(ValueError, match=message):
        call(model, model.new_cache(1))


def test_bad_use_of_drafts():
    model, ids = MODELS["mtp"], tokens(1, 6)
    cache = model.new_cache(1, num_draft_tokens=2)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"input_ids must be \(batch, 1 to 3\) behind the prompt .* got \(1, 4\)"):
        model(ids[:, :4], cache=cache)
    model(ids[:, :3], cache=cache)
    for counts in ([0], [4], [1, 1]):
        with pytest.raises(ValueError, match="counts must be from 1 to the tokens of the last call"):
            cache.accept(counts)
    assert cache.lengths == [9]
    cache.accept([2])
    for _ in range(2):  # once a call, and not behind a prompt
        with pytest.raises(ValueError, match="accept must come once behind a call of"):
            cache.accept([1])
        cache.reset()
        model(ids, cache=cache)
    assert cache.lengths == [6]


def test_no_sequences():
    model = MODELS["mtp"]
    assert model.generate(tokens(0, 3), 2, num_draft_tokens=2).shape == (0, 0)
    assert model.draft(torch.zeros(0, 2, 48).double(), tokens(0, 2), 3, model.new_cache(0, mtp=True)).shape == (0, 3)
    assert [logits.shape[1] for logits in model(tokens(1, 2), mtp_depth=3)[1]] == [1, 0, 0]


def test_warmup():
    """It leaves the model and its counts as they were."""
    model = build("mtp")
    before = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    hybrid_ops.warmup(model, batch_sizes=(1,))
    assert all(t.equal(before[name]) for name, t in [*model.named_parameters(), *model.named_buffers()])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MTP_CONFIGS)
def test_gpu(name):
    """The kernels with drafts: the same tokens, the head's logits as on the CPU."""
    model = build(name, torch.float32)
    ids = tokens(2, 17)
    expected, generated = model(ids, mtp_depth=2)[1], model.generate(ids, 24)
    model.cuda()
    for mine, theirs in zip(model(ids.cuda(), mtp_depth=2)[1], expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-4)  # as for transformers
    for drafts in (1, 3):
        assert model.generate(ids.cuda(), 24, num_draft_tokens=drafts).cpu().equal(generated)
