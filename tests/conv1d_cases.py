"""Problems for causal_conv1d, random or plain, and the checks of an implementation against the NumPy reference."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import conv1d as reference

from .budget import assert_within, to_numpy

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETER_DTYPES = [torch.float32, torch.float16]  # the interpreter truncates float32 to bfloat16
LAYOUTS = {
    "channel_last": lambda x: x,
    "slice": lambda x: F.pad(x, (8, 8))[..., 8:-8],
    "channel_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "length_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}
ENOUGH = 32  # tokens from which a channel's RMS is a statistic, not the luck of a few values
PLAIN = dict(
    seed=0, dtype=torch.bfloat16, form="dense", batch=2, lengths=[5, 0, 20, 0, 20], seqlen=45, dim=8, width=4,
    bias=True, activation="silu", history=True, layout="slice", weight_dtype=torch.float32, state_dtype=torch.bfloat16,
    extra_columns=0, padding="left",
)  # fmt: skip


@st.composite
def cases(draw, dtypes, max_seqlen=40, dims=(1, 12), widths=(1, 8)):
    dtype = draw(st.sampled_from(dtypes))
    return dict(
        seed=draw(st.integers(0, 2**31 - 1)),
        dtype=dtype,
        form=draw(st.sampled_from(["dense", "cu_seqlens", "seq_idx"])),
        batch=draw(st.sampled_from([1, 0, 3])),
        lengths=draw(st.lists(st.sampled_from([0, 1, 2, max_seqlen - 1, max_seqlen]), max_size=4)),
        seqlen=draw(st.sampled_from([max_seqlen, 0, 1, 2, 5])),
        dim=draw(st.integers(*dims)),
        width=draw(st.integers(*widths)),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", None])),
        history=draw(st.booleans()),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        weight_dtype=draw(st.sampled_from([dtype, torch.float32])),
        state_dtype=draw(st.sampled_from([dtype, torch.float32])),
        extra_columns=draw(st.sampled_from([0, 1, 5])),
        padding=draw(st.sampled_from(["none", "left", "anywhere"])),
    )


class Problem:
    """The tensors of a case: `arguments` and `options` for the op, the same in NumPy for the reference."""

    def __init__(self, case, device="cpu"):
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case["seed"])
        packed = case["form"] == "cu_seqlens"
        self.batch = 1 if packed else case["batch"]
        self.seqlen = sum(case["lengths"]) if packed else case["seqlen"]
        self.nseq = len(case["lengths"]) if packed else self.batch
        dim, dtype = case["dim"], case["dtype"]
        # a channel of small scale counts as much as a large one; of a larger one few tokens would be where silu bends
        self.scale = scale = 10 ** torch.linspace(-3, 1, dim)
        self.x = LAYOUTS[case["layout"]]((self.randn(self.batch, self.seqlen, dim) * scale).to(device, dtype))
        self.weight = self.randn(dim, case["width"]).to(device, case["weight_dtype"])
        # positive: where all sums of a channel are far below zero, exp(sum) only shows how its exponent was rounded
        self.bias = (self.randn(dim).abs() * scale).to(device, case["weight_dtype"]) if case["bias"] else None
        if case["bias"] and case["layout"] == "slice":  # vectors may be strided too
            self.bias = self.bias.repeat_interleave(2)[::2]
        self.sequences = dict(activation=case["activation"])
        self.tokens = self.batch * self.seqlen
        if packed:
            bounds = [0, *np.cumsum(case["lengths"]).tolist()]
            self.sequences["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        elif case["form"] == "seq_idx":
            seq_idx = self.seq_idx()
            self.tokens = int((seq_idx >= 0).sum())
            self.sequences["seq_idx"] = seq_idx.to(device)
        self.initial_states = None
        if case["history"]:
            states = (self.randn(self.nseq, case["width"] - 1, dim) * scale).to(device, case["state_dtype"])
            self.initial_states = states.transpose(1, 2)  # no reader may count on contiguous columns

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def randint(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32)

    def seq_idx(self):
        """Runs of one to a few tokens; an index may come back later, and is then another sequence."""
        index = (self.randint(0, 4, self.batch, self.seqlen) == 0).int().cumsum(1).int() % 3
        if self.case["padding"] == "left":
            index[torch.arange(self.seqlen) < self.randint(0, self.seqlen + 1, self.batch, 1)] = -1
        elif self.case["padding"] == "anywhere":
            index[self.randint(0, 3, self.batch, self.seqlen) == 0] = -1
        return index

    def arrays(self, dtype=np.float64):
        """x, weight, bias of the reference, and its options."""
        tensors = (to_numpy(t, dtype) for t in (self.x, self.weight, self.bias))
        options = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in self.sequences.items()}
        return tensors, dict(options, dtype=dtype)

    def assert_y(self, y, ref, baseline):
        assert_within("y", y, ref, baseline, self.case["dtype"], axis=-1 if self.tokens >= ENOUGH else None)
        if "seq_idx" in self.sequences:
            assert not y[self.sequences["seq_idx"] < 0].any()


def check_conv1d(case, run, device="cpu"):
    """`run` has the signature of causal_conv1d."""
    problem = Problem(case, device)
    y, final = run(
        problem.x,
        problem.weight,
        problem.bias,
        initial_states=problem.initial_states,
        return_final_states=True,
        **problem.sequences,
    )
    results = []
    for dtype in (np.float64, np.float32):
        tensors, options = problem.arrays(dtype)
        initial = to_numpy(problem.initial_states, dtype)
        results.append(reference.causal_conv1d(*tensors, initial_states=initial, **options))
    (ref, ref_final), (base, _) = results
    problem.assert_y(y, ref, base)
    np.testing.assert_array_equal(to_numpy(final), ref_final)  # copies of inputs
    assert final.dtype == (case["state_dtype"] if case["history"] else case["dtype"])
    assert_order_of_strides(y, problem.x)


def assert_order_of_strides(y, x):
    order = sorted((i for i in range(3) if x.shape[i] > 1), key=x.stride, reverse=True)
    rest = [i for i in range(3) if i not in order]
    assert y.permute(*rest, *order).is_contiguous(), (y.shape, y.stride(), x.stride())


def check_pool(case, run, device="cpu"):
    problem = Problem(case, device)
    nslots, state_len = problem.nseq + 2, case["width"] - 1 + case["extra_columns"]
    pool = problem.randn(nslots, state_len, case["dim"]).to(device, case["state_dtype"]).transpose(1, 2)
    slots = torch.randperm(nslots, generator=problem.generator).int()[: problem.nseq]
    null = -1 if case["bias"] else 0  # some callers keep slot 0 unused
    read, write = slots.clone(), slots.clone()
    write[problem.randint(0, 5, problem.nseq) == 0] = null
    read[problem.randint(0, 5, problem.nseq) == 0] = null
    read, write = (
        (None if not case["history"] else read),
        (None if case["history"] and case["seed"] % 3 == 0 else write),
    )
    slots = dict(read_slots=read, write_slots=write)
    results = []
    for dtype in (np.float64, np.float32):
        tensors, options = problem.arrays(dtype)
        options |= {k: None if v is None else v.tolist() for k, v in slots.items()}
        pool_before = to_numpy(pool, dtype)
        results.append(reference.causal_conv1d_pool(*tensors, conv_state=pool_before, null_slot=null, **options))
    (ref, ref_pool), (base, _) = results
    y = run(
        problem.x,
        problem.weight,
        problem.bias,
        conv_state=pool,
        null_slot=null,
        **{k: None if v is None else v.to(device) for k, v in slots.items()},
        **problem.sequences,
    )
    problem.assert_y(y, ref, base)
    np.testing.assert_array_equal(to_numpy(pool), ref_pool)


def for_cuda(case):
    """The nearest case that the CUDA kernel takes."""
    if hybrid_ops._device.extension_missing() is not None:
        pytest.skip("the CUDA extension is not built")
    form = "dense" if case["form"] == "seq_idx" else case["form"]
    layout = "slice" if case["layout"] == "channel_first" else case["layout"]
    return case | dict(dim=4 * (1 + case["dim"] // 4), form=form, layout=layout)  # vectors of 8 bytes and of 16


def implementation(impl):
    return functools.partial(hybrid_ops.causal_conv1d, impl=impl)
