import itertools

import pytest
import torch

from hybrid_ops.compat import vllm as compat

from .compat_cases import (
    DSTATE,
    HEADDIM,
    NHEADS,
    STEP_ARGUMENTS,
    conv,
    differ,
    packed,
    randn,
    same,
    scan,
    signature,
    step,
    step_inputs,
)
from .tensors import int32

STATE = (NHEADS, HEADDIM, DSTATE)


def test_signatures():
    assert signature(compat.mamba_chunk_scan_combined_varlen) == (
        "x, dt, A, B, C, chunk_size, cu_seqlens, cu_chunk_seqlens, last_chunk_indices, seq_idx, out, D=None, z=None, "
        "dt_bias=None, initial_states=None, dt_softplus=False, dt_limit=(0.0, inf), return_intermediate_states=False, "
        "state_dtype=None, final_states_out=None, final_state_indices=None"
    )
    assert signature(compat.causal_conv1d_fn) == (
        "x, weight, bias, conv_states, query_start_loc, cache_indices=None, has_initial_state=None, activation='silu', "
        "pad_slot_id=-1, null_block_id=0, block_idx_first_scheduled_token=None, block_idx_last_scheduled_token=None, "
        "initial_state_idx=None, num_computed_tokens=None, block_size_to_align=0, metadata=None, validate_data=False"
    )
    assert signature(compat.causal_conv1d_update) == (
        "x, conv_state, weight, bias=None, activation=None, conv_state_indices=None, num_accepted_tokens=None, "
        "query_start_loc=None, max_query_len=-1, null_block_id=0, block_idx_last_scheduled_token=None, "
        "initial_state_idx=None, validate_data=False, out=None"
    )
    assert signature(compat.selective_state_update) == (
        "state, x, dt, A, B, C, D, dt_bias, z=None, dt_softplus=False, state_batch_indices=None, "
        "dst_state_batch_indices=None, null_block_id=0, out=None, num_accepted_tokens=None, cu_seqlens=None, "
        "is_blackwell=False, enable_stochastic_rounding=False, cache_philox_rounds=0"
    )


# scan


def chunks(lengths, chunk_size, computed=None):
    """vLLM's metadata: chunks end with their sequence and at multiples of chunk_size, counted in the packed tokens or,
    with `computed`, in each sequence behind those computed before."""
    ends, last, seq_idx, begin = [0], [], [], 0
    for s, n in enumerate(lengths):
        position = begin if computed is None else computed[s]
        done = 0
        while done < n:
            done += min(n - done, chunk_size - (position + done) % chunk_size)
            ends.append(begin + done)
            seq_idx.append(s)
        last.append(len(seq_idx) - 1 if n else -1)
        begin += n
    return dict(cu_chunk_seqlens=int32(*ends), last_chunk_indices=int32(*last), seq_idx=int32(*seq_idx))


def varlen_inputs(lengths, chunk_size=16, **metadata):
    (x, dt, A, B, C), cu_seqlens, _ = packed(lengths)
    tensors = dict(x=x[0], dt=dt[0], A=A, B=B[0], C=C[0], out=torch.full_like(x[0], torch.nan))
    return tensors | dict(chunk_size=chunk_size, cu_seqlens=cu_seqlens) | chunks(lengths, chunk_size, **metadata)


def varlen(x, dt, A, B, C, cu_seqlens, z=None, initial_states=None, **options):
    """(y, for each sequence the states after its tokens, the initial one first)."""
    ys, states = [], []
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        initial = torch.zeros(1, *STATE, dtype=x.dtype) if initial_states is None else initial_states[b : b + 1]
        states.append(initial)
        if end > begin:
            parts = (t if t is None or t is A else t[None, begin:end] for t in (x, dt, A, B, C, None, z))
            y, each = scan(*parts, initial=initial, **options)
            ys.append(y[0])
            states[-1] = torch.cat([initial, each[0]])
    return torch.cat(ys), states


LENGTHS = [20, 0, 5, 40]
TOTAL = sum(LENGTHS)
NAMES = ("x", "dt", "A", "B", "C", "cu_seqlens")
SCAN_ARGUMENTS = {
    "D": dict(D=randn(NHEADS)),
    "D by feature": dict(D=randn(NHEADS, HEADDIM)),
    "z": dict(z=randn(TOTAL, NHEADS, HEADDIM)),
    "dt_bias": dict(dt_bias=randn(NHEADS)),
    "initial_states": dict(initial_states=randn(4, *STATE)),
    "dt_softplus": dict(dt_softplus=True),
    "dt_limit": dict(dt_limit=(0.3, 0.9)),
}


@pytest.mark.parametrize("name", SCAN_ARGUMENTS)
def test_scan_argument(name):
    inputs, given = varlen_inputs(LENGTHS), SCAN_ARGUMENTS[name]
    final = compat.mamba_chunk_scan_combined_varlen(**inputs, **given)
    needed = {key: inputs[key] for key in NAMES}
    D = given.get("D")  # scan takes it, varlen hands options on
    expected, states = varlen(**needed, **{k: v for k, v in given.items() if k != "D"})
    if D is not None:
        expected = expected + inputs["x"] * (D if D.dim() == 2 else D[:, None])
    same(inputs["out"], expected)
    same(final, torch.stack([each[-1] for each in states]))
    differ(expected, varlen(**needed)[0])


def test_scan_states_into_a_pool():
    inputs, initial = varlen_inputs(LENGTHS), randn(4, *STATE)
    pool = randn(6, *STATE, seed=9)
    before = pool.clone()
    indices = torch.tensor([4, 2, -1, 0])
    assert (
        compat.mamba_chunk_scan_combined_varlen(
            **inputs, initial_states=initial, final_states_out=pool, final_state_indices=indices
        )
        is None
    )
    _, states = varlen(**{key: inputs[key] for key in NAMES}, initial_states=initial)
    same(pool[[4, 2, 0]], torch.stack([states[b][-1] for b in (0, 1, 3)]))
    assert pool[[1, 3, 5]].equal(before[[1, 3, 5]])
    compat.mamba_chunk_scan_combined_varlen(
        **inputs, final_states_out=pool, final_state_indices=torch.full_like(indices, -1)
    )
    same(pool[[4, 2, 0]], torch.stack([states[b][-1] for b in (0, 1, 3)]))  # nobody's slot: nothing written


@pytest.mark.parametrize("lengths", [LENGTHS, [16, 16, 33], [3, 29, 1, 0], [7], [0, 0]])
@pytest.mark.parametrize("chunk_size", [16, 32])
@pytest.mark.parametrize("computed", [None, [5, 0, 16, 30]], ids=["packed", "computed"])
def test_scan_intermediate_states(lengths, chunk_size, computed):
    inputs, initial = varlen_inputs(lengths, chunk_size, computed=computed), randn(len(lengths), *STATE)
    got = compat.mamba_chunk_scan_combined_varlen(**inputs, initial_states=initial, return_intermediate_states=True)
    assert got.shape == (len(inputs["seq_idx"]), *STATE)
    if sum(lengths) == 0:
        return
    expected, states = varlen(**{key: inputs[key] for key in NAMES}, initial_states=initial)
    ends = inputs["cu_chunk_seqlens"][1:] - inputs["cu_seqlens"][inputs["seq_idx"].long()]
    same(inputs["out"], expected)
    same(got, torch.stack([states[s][end] for s, end in zip(inputs["seq_idx"], ends, strict=True)]))


def test_scan_state_dtype():
    inputs = varlen_inputs([5, 3])
    inputs |= {k: inputs[k].bfloat16() for k in ("x", "B", "C", "out")} | {k: inputs[k].float() for k in ("dt", "A")}
    assert compat.mamba_chunk_scan_combined_varlen(**inputs).dtype == torch.bfloat16
    assert compat.mamba_chunk_scan_combined_varlen(**inputs, state_dtype=torch.float32).dtype == torch.float32
    pool = torch.zeros(2, *STATE)  # not rounded on the way
    compat.mamba_chunk_scan_combined_varlen(**inputs, final_states_out=pool, final_state_indices=int32(0, 1))
    assert pool.equal(compat.mamba_chunk_scan_combined_varlen(**inputs, state_dtype=torch.float32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(chunk_size=0), "chunk_size must be a positive int"),
        (dict(chunk_size=24, return_intermediate_states=True), "chunk_size must be a power of two >= 16, got 24"),
        (dict(final_state_indices=int32(0, 1)), "final_states_out and final_state_indices must come together"),
        (dict(final_states_out=randn(2, *STATE)), "final_states_out and final_state_indices must come together"),
        (dict(final_states_out=randn(2, *STATE), final_state_indices=int32(0)), "final_state_indices must have shape"),
        (dict(final_states_out=randn(2, 3), final_state_indices=int32(0, 1)), "final_states_out must have shape"),
        (dict(out=randn(3, NHEADS, HEADDIM)), "out must have shape"),
    ],
)
def test_scan_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        compat.mamba_chunk_scan_combined_varlen(**(varlen_inputs([5, 3]) | wrong))


# convolution of whole sequences

DIM, WIDTH = 6, 4


def conv_inputs(lengths=(5, 2, 0, 7)):
    return dict(
        x=randn(sum(lengths), DIM, seed=1).T,
        weight=randn(DIM, WIDTH, seed=2),
        bias=randn(DIM, seed=3),
        conv_states=randn(6, WIDTH + 1, DIM, seed=4).transpose(1, 2),  # two columns more than the window
        query_start_loc=int32(0, *lengths).cumsum(0),
    )


def check_conv(inputs, rows, initial, silu=True):
    """y, the windows of the rows, nothing else written. A row of -1 is padding."""
    pool, before = inputs["conv_states"], inputs["conv_states"].clone()
    y = compat.causal_conv1d_fn(**inputs)
    assert y.shape == inputs["x"].shape
    assert y.stride() == inputs["x"].stride()
    starts = inputs["query_start_loc"]
    for i, row in enumerate(rows):
        if row == -1:
            continue
        x = inputs["x"][None, :, starts[i] : starts[i + 1]]
        history = before[row : row + 1, :, : WIDTH - 1] if initial[i] else torch.zeros(1, DIM, WIDTH - 1).double()
        same(y[None, :, starts[i] : starts[i + 1]], conv(x, inputs["weight"], inputs["bias"], silu, history))
        same(pool[row : row + 1, :, : WIDTH - 1], torch.cat([history, x], 2)[..., -(WIDTH - 1) :])
    others = [row for row in range(len(pool)) if row not in rows]
    assert pool[others].equal(before[others])
    assert pool[..., WIDTH - 1 :].equal(before[..., WIDTH - 1 :])


HAS = torch.tensor([True, False, True, True])


def test_conv():
    check_conv(conv_inputs(), [0, 1, 2, 3], [False] * 4)


def test_conv_has_initial_state():
    check_conv(conv_inputs() | dict(has_initial_state=HAS), [0, 1, 2, 3], HAS)


def test_conv_cache_indices():
    check_conv(conv_inputs() | dict(cache_indices=torch.tensor([4, 1, 5, 2]), has_initial_state=HAS), [4, 1, 5, 2], HAS)


def test_conv_padding():
    indices = int32(0, 1, 5, -1)
    check_conv(conv_inputs() | dict(cache_indices=indices, has_initial_state=HAS), [-1, 1, 5, -1], HAS)
    check_conv(conv_inputs() | dict(cache_indices=indices, null_block_id=5), [0, 1, -1, -1], [False] * 4)
    check_conv(conv_inputs() | dict(cache_indices=indices, pad_slot_id=1), [-1, -1, 5, -1], [False] * 4)


@pytest.mark.parametrize(("activation", "silu"), [(None, False), (False, False), (True, True), ("swish", True)])
def test_conv_activation(activation, silu):
    check_conv(conv_inputs() | dict(activation=activation), [0, 1, 2, 3], [False] * 4, silu)


def test_conv_without_bias():
    check_conv(conv_inputs() | dict(bias=None), [0, 1, 2, 3], [False] * 4)


def test_conv_arguments_without_consequence():
    inputs = conv_inputs() | dict(metadata=object(), validate_data=True)
    check_conv(inputs, [0, 1, 2, 3], [False] * 4)


PREFIX_CACHING = ("block_idx_first_scheduled_token", "block_idx_last_scheduled_token", "initial_state_idx")


@pytest.mark.parametrize("name", [*PREFIX_CACHING, "num_computed_tokens", "block_size_to_align"])
def test_conv_prefix_caching(name):
    inputs = conv_inputs()
    before = inputs["conv_states"].clone()
    with pytest.raises(ValueError, match=rf"{name} must be None.*hybrid_ops\.causal_conv1d"):
        compat.causal_conv1d_fn(**inputs, **{name: 16 if name == "block_size_to_align" else int32(0, 0, 0, 0)})
    assert inputs["conv_states"].equal(before)


# convolution of new tokens

WEIGHT, BIAS = randn(DIM, WIDTH, seed=2), randn(DIM, seed=3)


def pool_of(columns, nslots=7):
    return randn(nslots, columns, DIM, seed=4).transpose(1, 2)


@pytest.mark.parametrize("steps", [None, 1, 3, 5])
@pytest.mark.parametrize("given", [{}, dict(bias=BIAS), dict(activation="silu"), dict(activation=True, bias=BIAS)])
def test_update(steps, given):
    x = randn(2, DIM, seed=1) if steps is None else randn(2, DIM, steps, seed=1)
    pool = pool_of(5)
    u = torch.cat([pool[:2, :, : WIDTH - 1], x.view(2, DIM, -1)], 2)
    expected = conv(u, WEIGHT, given.get("bias"), silu="activation" in given)[..., WIDTH - 1 :]
    beyond = pool[..., WIDTH - 1 :].clone()
    y = compat.causal_conv1d_update(x, pool, WEIGHT, **given, validate_data=True)
    assert y is x  # overwritten
    same(y.view(2, DIM, -1), expected)
    same(pool[:2, :, : WIDTH - 1], u[..., -(WIDTH - 1) :])
    assert pool[..., WIDTH - 1 :].equal(beyond)


@pytest.mark.parametrize("steps", [None, 3])
def test_update_out(steps):
    x = randn(2, DIM, seed=1) if steps is None else randn(2, DIM, steps, seed=1)
    before, out, pool = x.clone(), torch.full_like(x, torch.nan), pool_of(3)
    u = torch.cat([pool[:2], x.view(2, DIM, -1)], 2)
    assert compat.causal_conv1d_update(x, pool, WEIGHT, out=out) is out
    same(out.view(2, DIM, -1), conv(u, WEIGHT)[..., 3:])
    assert x.equal(before)


@pytest.mark.parametrize(("null", "indices"), [(0, [5, 0, 2, -1]), (2, [5, -1, 0, 2])])
def test_update_null_block_id(null, indices):
    x, pool = randn(4, DIM, seed=1), pool_of(3)
    before, live = pool.clone(), [i for i, row in enumerate(indices) if row not in (null, -1)]
    u = torch.cat([before[[indices[i] for i in live]], x[live, :, None]], 2)
    table = torch.tensor(indices)[:, None].expand(-1, 2)  # of blocks, the first counts
    y = compat.causal_conv1d_update(x, pool, WEIGHT, conv_state_indices=table, null_block_id=null)
    same(y[live], conv(u, WEIGHT)[..., -1])
    assert (y[[i for i in range(4) if i not in live]] == 0).all()
    for row in range(len(pool)):
        place = [i for i in live if indices[i] == row]
        same(pool[row], u[live.index(place[0]), :, 1:] if place else before[row])


def test_update_of_packed_sequences():
    """The window is the last inputs also of a sequence shorter than the longest, where vLLM's is not."""
    lengths, rows = [3, 0, 1, 5], [4, 1, 6, 2]
    x, pool = randn(9, DIM, seed=1), pool_of(3)
    before, tokens = pool.clone(), x.clone().split(lengths)
    y = compat.causal_conv1d_update(
        x, pool, WEIGHT, conv_state_indices=int32(*rows), query_start_loc=int32(0, *lengths).cumsum(0), max_query_len=5
    )
    for part, new, row in zip(y.split(lengths), tokens, rows, strict=True):
        u = torch.cat([before[row], new.T], 1)
        same(part.T, conv(u[None], WEIGHT)[0, :, 3:])
        same(pool[row], u[:, -3:])


def speculate(pool, row, accepted, tokens):
    """vLLM's sliding window: (y, the columns that its slot has now)."""
    history = pool[row, :, accepted - 1 : accepted + WIDTH - 2]
    return conv(tokens.T[None], WEIGHT, history=history[None])[0].T, torch.cat([history[:, 1:], tokens.T], 1)


@pytest.mark.parametrize("lengths", [[4, 4, 4, 4], [4, 1, 0, 2], [3, 4, 2, 1], [1, 1, 1, 1]])
@pytest.mark.parametrize("columns", [6, 8])
def test_update_num_accepted_tokens(lengths, columns):
    """Packed, each sequence with drafts of its own number, accepted ones too; slot 0 and -1 are padding."""
    rows, accepted = [4, 0, 6, 2], [1, 2, 4, 3]
    x, pool = randn(sum(lengths), DIM, seed=1), pool_of(columns)
    before, tokens = pool.clone(), x.clone().split(lengths)
    y = compat.causal_conv1d_update(
        *(x, pool, WEIGHT),
        conv_state_indices=int32(*rows),
        num_accepted_tokens=int32(*accepted),
        query_start_loc=int32(0, *lengths).cumsum(0),
        max_query_len=4,
    )
    for part, new, row, k in zip(y.split(lengths), tokens, rows, accepted, strict=True):
        if row == 0:
            assert (part == 0).all()
            assert pool[row].equal(before[row])
        elif len(new):
            expected, window = speculate(before, row, k, new)
            same(part, expected)
            same(pool[row, :, : window.shape[1]], window)
        else:
            assert pool[row].equal(before[row])
    assert pool[[1, 3, 5]].equal(before[[1, 3, 5]])


@pytest.mark.parametrize("steps", [None, 1, 3, 4])
def test_update_num_accepted_tokens_of_a_batch(steps):
    x = randn(2, DIM, seed=1) if steps is None else randn(2, DIM, steps, seed=1)
    pool = pool_of(6)
    before, tokens = pool.clone(), x.clone().view(2, DIM, -1)
    options = dict(num_accepted_tokens=torch.tensor([3, 1]), max_query_len=4)  # that of packed sequences
    y = compat.causal_conv1d_update(x, pool, WEIGHT, **options).view(2, DIM, -1)
    for b, k in enumerate([3, 1]):
        expected, window = speculate(before, b, k, tokens[b].T)
        same(y[b].T, expected)
        same(pool[b, :, : window.shape[1]], window)
    assert pool[2:].equal(before[2:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(block_idx_last_scheduled_token=int32(0, 0)), r"block_idx_last.* must be None.*hybrid_ops\.causal_conv1d"),
        (dict(initial_state_idx=int32(0, 0)), r"initial_state_idx must be None.*hybrid_ops\.causal_conv1d"),
        (dict(activation="gelu"), "activation must be"),
        (
            dict(num_accepted_tokens=int32(1, 1), query_start_loc=int32(0, 1, 2), max_query_len=4),
            "conv_state must have",
        ),
    ],
)
def test_update_bad_input(wrong, message):
    x, pool = randn(2, DIM), pool_of(5)
    before = pool.clone()
    with pytest.raises(ValueError, match=message):
        compat.causal_conv1d_update(x, pool, WEIGHT, **wrong)
    assert pool.equal(before)


# state update


def update_inputs(rows=7):
    inputs = step_inputs(rows=rows)
    more = dict(D=randn(NHEADS, HEADDIM, seed=6), dt_bias=randn(NHEADS, seed=7)[:, None].expand(-1, HEADDIM))
    return inputs | more | dict(out=torch.full_like(inputs["x"], torch.nan))


def reference(inputs, state):
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "z", "dt_softplus")
    return step(state, **{name: inputs[name] for name in names if name in inputs})


@pytest.mark.parametrize("name", [*STEP_ARGUMENTS, "no D", "no dt_bias"])
def test_state_update_argument(name):
    given = {"no D": dict(D=None), "no dt_bias": dict(dt_bias=None)}.get(name) or STEP_ARGUMENTS[name]
    inputs = update_inputs(rows=2)
    expected, state = reference(inputs | given, inputs["state"])
    differ(expected, reference(inputs, inputs["state"])[0])
    assert compat.selective_state_update(**(inputs | given)) is None
    same(inputs["out"], expected)
    same(inputs["state"], state)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (3, 2)])
def test_state_update_slots(shape):
    """Read here, written there. Of a table the first column counts, and rows behind the batch are not read."""
    read, write = torch.full(shape, 1), torch.full(shape, 1)
    read.view(shape[0], -1)[:2, 0], write.view(shape[0], -1)[:2, 0] = torch.tensor([4, 2]), torch.tensor([3, 2])
    inputs = update_inputs()
    before = inputs["state"].clone()
    compat.selective_state_update(**inputs, state_batch_indices=read, dst_state_batch_indices=write)
    expected, state = reference(inputs, before[[4, 2]])
    same(inputs["out"], expected)
    same(inputs["state"][[3, 2]], state)
    assert inputs["state"][[0, 1, 4, 5, 6]].equal(before[[0, 1, 4, 5, 6]])


@pytest.mark.parametrize(("null", "indices"), [(0, [3, 0]), (0, [3, -1]), (5, [3, 5])])
def test_state_update_null_block_id(null, indices):
    inputs = update_inputs()
    before = inputs["state"].clone()
    compat.selective_state_update(**inputs, state_batch_indices=torch.tensor(indices), null_block_id=null)
    expected, state = reference(inputs, before[[3, 1]])
    same(inputs["out"][0], expected[0])
    assert (inputs["out"][1] == 0).all()
    same(inputs["state"][3], state[0])
    others = [row for row in range(7) if row != 3]
    assert inputs["state"][others].equal(before[others])


def several(inputs, lengths):
    """The packed tokens of sequences, from two of `inputs`."""
    which = torch.arange(sum(lengths)) % 2
    noise = 1 + torch.arange(sum(lengths)) / 10
    tokens = {name: inputs[name][which] * noise.view(-1, 1, 1) for name in ("x", "B", "C", "out")}
    dt = (inputs["dt"][which, :, 0] * noise[:, None])[..., None].expand(-1, -1, HEADDIM)
    return inputs | tokens | dict(dt=dt, cu_seqlens=int32(0, *lengths).cumsum(0), dt_softplus=True)


def follow(inputs, state, begin, end):
    """(y, the state after each token) of tokens in a row."""
    ys, states = [], []
    for t in range(begin, end):
        token = {name: inputs[name][t : t + 1] for name in ("x", "dt", "B", "C")}
        y, state = reference(inputs | token, state)
        ys.append(y[0])
        states.append(state[0])
    return ys, states


@pytest.mark.parametrize("dst", [False, True])
def test_state_update_cu_seqlens(dst):
    lengths, read = [3, 1, 2], [4, 2, 6]
    write = [1, 3, 5] if dst else read
    inputs = several(update_inputs(), lengths)
    before = inputs["state"].clone()
    slots = dict(state_batch_indices=int32(*read)) | (dict(dst_state_batch_indices=int32(*write)) if dst else {})
    compat.selective_state_update(**inputs, **slots)
    for b, (begin, end) in enumerate(itertools.pairwise(inputs["cu_seqlens"])):
        ys, states = follow(inputs, before[read[b]][None], begin, end)
        same(inputs["out"][begin:end], torch.stack(ys))
        same(inputs["state"][write[b]], states[-1])


@pytest.mark.parametrize("dst", [False, True])
def test_state_update_num_accepted_tokens(dst):
    """Three sequences of up to 3 drafts, the last of padding; each draft's state has a slot."""
    lengths, accepted = [3, 1, 2], [2, 1, 1]
    read = torch.tensor([[1, 2, 3], [4, 5, 6], [0, 0, 0]])
    write = read + 6 * (read > 0) if dst else read
    inputs = several(update_inputs(rows=14), lengths)
    before = inputs["state"].clone()
    slots = dict(state_batch_indices=read) | (dict(dst_state_batch_indices=write) if dst else {})
    compat.selective_state_update(**inputs, **slots, num_accepted_tokens=torch.tensor(accepted))
    written = []
    for b in range(2):
        begin, end = inputs["cu_seqlens"][b : b + 2]
        ys, states = follow(inputs, before[read[b, accepted[b] - 1]][None], begin, end)
        same(inputs["out"][begin:end], torch.stack(ys))
        same(inputs["state"][write[b, : end - begin]], torch.stack(states))
        written += write[b, : end - begin].tolist()
    assert (inputs["out"][4:] == 0).all()
    others = [row for row in range(14) if row not in written]
    assert inputs["state"][others].equal(before[others])


def test_state_update_num_accepted_tokens_of_single_tokens():
    inputs = update_inputs()
    before = inputs["state"].clone()
    table = int32(1, 2, 3, 4, 5, 6).view(2, 3)
    compat.selective_state_update(**inputs, state_batch_indices=table, num_accepted_tokens=int32(3, 1))
    expected, state = reference(inputs, before[[3, 4]])
    same(inputs["out"], expected)
    same(inputs["state"][[1, 4]], state)


def test_state_update_stochastic_rounding():
    torch.manual_seed(0)
    x, B, A = torch.zeros(2, 1, 8), torch.zeros(2, 1, 4), torch.full((1, 1, 1), -0.1).expand(1, 8, 4)
    dt, state = torch.ones(2, 1, 1).expand(2, 1, 8), randn(2, 1, 8, 4).half()
    exact = state.double() * torch.tensor(-0.1).double().exp()
    runs = []
    for _ in range(64):
        runs.append(state.clone())
        options = dict(out=torch.empty_like(x), enable_stochastic_rounding=True)
        compat.selective_state_update(runs[-1], x, dt, A, B, B, None, None, **options)
    runs = torch.stack(runs).double()
    assert not runs[0].equal(runs[1])  # other bits in each call
    assert ((runs - exact).abs() <= exact.abs() * 2**-10).all()
    # a mean of 64 draws is some 8 times as near as one, rounding to nearest not
    assert (runs.mean(0) - exact).abs().mean() < (exact.half() - exact).abs().mean() / 2


@pytest.mark.parametrize("is_blackwell", [False, True])
def test_state_update_arguments_without_consequence(is_blackwell):
    inputs = update_inputs(rows=2)
    expected, _ = reference(inputs, inputs["state"])
    compat.selective_state_update(**inputs, is_blackwell=is_blackwell, cache_philox_rounds=4)
    same(inputs["out"], expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(out=None), "out must be a tensor like x, got None"),
        (dict(out=randn(3, NHEADS, HEADDIM)), "out must have shape"),
        (dict(enable_stochastic_rounding=True, cache_philox_rounds=5), "cache_philox_rounds must be 0 or 10, got 5"),
        (dict(num_accepted_tokens=int32(1, 1)), "num_accepted_tokens must be None.*it needs state_batch_indices"),
        (dict(dst_state_batch_indices=int32(1, 2)), "dst_state_batch_indices must be None.*needs state_batch_indices"),
    ],
)
def test_state_update_bad_input(wrong, message):
    inputs = update_inputs()
    before = inputs["state"].clone()
    with pytest.raises(ValueError, match=message):
        compat.selective_state_update(**(inputs | wrong))
    assert inputs["state"].equal(before)


# under torch.compile, and beside the original


def test_compiles(compile_once):
    """Decode with drafts, where the windows are moved too."""
    table, weight, A = int32(1, 2, 3, 4).view(2, 2), WEIGHT.float(), -torch.ones(NHEADS)

    def layer(x, pool, state, heads, dt, B):
        compat.causal_conv1d_update(
            *(x, pool, weight),
            conv_state_indices=table,
            num_accepted_tokens=int32(2, 1),
            query_start_loc=int32(0, 2, 3),
            max_query_len=2,
        )
        compat.selective_state_update(
            *(state, heads, dt.expand(-1, -1, HEADDIM), A[:, None, None].expand(-1, HEADDIM, DSTATE), B, B, None, None),
            state_batch_indices=table,
            num_accepted_tokens=int32(2, 1),
            cu_seqlens=int32(0, 2, 3),
            out=heads,
        )
        return x.sum() + heads.sum()

    def inputs(nslots):
        shapes = [(3, DIM), (nslots, DIM, 4), (nslots, *STATE), (3, NHEADS, HEADDIM), (3, NHEADS, 1), (3, 2, DSTATE)]
        return [randn(*shape, seed=i).float() for i, shape in enumerate(shapes)]

    compile_once(layer, "aot_eager", inputs, lengths=(7, 9, 11), grads=(False,))
