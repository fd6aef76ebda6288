"""Random products of quantised matrices, and the check that every implementation passes."""

import random

import numpy as np
import torch
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import gemm_fp8, gemm_nvfp4
from hybrid_ops.reference.grouped_gemm import grouped_gemm

from .budget import assert_within, to_numpy
from .moe_cases import ACTIVATIONS, orders_of_k, worst
from .tensors import to_device

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETER_DTYPES = [torch.float32, torch.float16]  # the interpreter's bfloat16 is wrong
SCALINGS = ["tensor", "row", "1x128", "128x128", "mx"]
LAYOUTS = ["linear", "128x4"]
ANY_LEFT = ["plain", "plain", *SCALINGS, *LAYOUTS]
E5M2 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@st.composite
def cases(draw, grouped, nvfp4, dtypes=DTYPES, sizes=(0, 0, 1, 2, 18), widths=(40, 57, 140), depths=(16, 48, 144, 272)):
    """Rows have 40 columns or more: few values decide the error of a row, and ReLU leaves half of them."""
    choose = random.Random(draw(st.integers(0, 2**64))).choice
    a_kind = choose(ANY_LEFT if nvfp4 else SCALINGS)
    return dict(
        seed=choose(range(2**31)),
        nvfp4=nvfp4,
        grouped=grouped,
        sizes=[choose(sizes) for _ in range(choose(range(1, 5)) if grouped else 1)],
        tail=choose([0, 3]) if grouped else 0,  # rows of no expert
        N=choose(widths),
        K=choose(depths),
        a_kind=a_kind,
        b_kind=choose([*LAYOUTS, "packed"] if nvfp4 else SCALINGS),
        a_dtype=choose(dtypes) if a_kind == "plain" else choose(E5M2),
        b_dtype=choose(E5M2),
        out_dtype=choose(dtypes),
        bias=choose([None, torch.float32, "out"]) if not grouped else None,
        activation=choose(ACTIVATIONS) if grouped else None,
        gather=choose([False, True]) if grouped else False,
        row_scale=choose([False, True]) if grouped else False,
        strided=choose([False, True]),
        out=choose([None, "fresh", "transposed"]),
        batch_invariant=choose([False, True]),
        fast_accum=False,
    )


DENSE = dict(
    seed=0, nvfp4=False, grouped=False, sizes=[9], tail=0, N=40, K=272, a_kind="row", b_kind="row",
    a_dtype=torch.float8_e4m3fn, b_dtype=torch.float8_e4m3fn, out_dtype=torch.bfloat16, bias=torch.float32,
    activation=None, gather=False, row_scale=False, strided=False, out=None, batch_invariant=False, fast_accum=False,
)  # fmt: skip
GROUPED = DENSE | dict(grouped=True, sizes=[5, 0, 9, 4], tail=3, bias=None, row_scale=True)


def quantized(x, kind, dtype, strided=False):
    """x in the format of `kind`; with `strided`, as a slice of a wider tensor."""
    if kind == "plain":
        q = x.to(dtype)
    elif kind in SCALINGS:
        q = hybrid_ops.fp8_quantize(x, kind, dtype=dtype, impl="torch")
    else:
        q = hybrid_ops.nvfp4_quantize(x, scale_layout=kind, impl="torch")
    if not strided:
        return q
    return _sliced(q) if kind == "plain" else q._replace(data=_sliced(q.data))


def _sliced(t):
    wide = torch.zeros(*t.shape[:-2], t.shape[-2] + 1, t.shape[-1] + 3, dtype=torch.float32).to(t.dtype)
    wide.view(torch.uint8).fill_(0x7F)  # NaN, in FP8
    wide[..., 1:, 3:] = t
    return wide[..., 1:, 3:]


def problem(case):
    """(a, b) quantised, offs or None, options; on the CPU. Scales differ from block to block and expert to expert."""
    generator = torch.Generator().manual_seed(case["seed"])
    N, K, E = case["N"], case["K"], len(case["sizes"])
    rows = sum(case["sizes"]) + case["tail"]
    width = 2 * N if case["activation"] == "silu_gated" else N

    def values(*shape):  # at most 1 in size, for float16 ends at 65504 and ReLU squares
        size = 2.0 ** -torch.randint(0, 5, (*shape[:-1], -(-shape[-1] // 16)), generator=generator)
        return torch.randn(shape, generator=generator) * size.repeat_interleave(16, -1)[..., : shape[-1]]

    rows_of_a = max(rows // 3, 1) if case["gather"] else rows
    a = quantized(values(rows_of_a, K), case["a_kind"], case["a_dtype"], case["strided"])
    b = values(E, width, K) * 2.0 ** -torch.arange(E)[:, None, None]
    layout = "linear" if case["b_kind"] == "packed" else case["b_kind"]
    b = quantized(b if case["grouped"] else b[0], layout, case["b_dtype"], case["strided"])
    if not case["grouped"]:
        bias = torch.randn(N, generator=generator)
        bias = None if case["bias"] is None else bias.to(case["out_dtype"] if case["bias"] == "out" else case["bias"])
        return (a, b), None, dict(bias=bias)
    offs = torch.tensor(case["sizes"]).cumsum(0).int()
    options = dict(activation=case["activation"])
    if case["gather"]:
        options["gather"] = torch.randint(rows_of_a, (rows,), generator=generator).int()
    if case["row_scale"]:
        options["row_scale"] = torch.rand(rows, generator=generator)
    return (a, b), offs, options


def moved(value, device):
    """A tensor, or the tensors of a quantised one."""
    if isinstance(value, tuple):
        return type(value)(*(moved(part, device) for part in value))
    return to_device(value, device) if isinstance(value, torch.Tensor) else value


def implementation(impl, device="cpu"):
    """The product of tensors on the CPU, run on a device."""

    def run(case, a, b, offs, **options):
        family = "nvfp4" if case["nvfp4"] else "fp8"
        function = getattr(hybrid_ops, f"{family}_grouped_gemm" if case["grouped"] else f"{family}_gemm")
        b = hybrid_ops.nvfp4_prepack(b) if case["b_kind"] == "packed" else b
        more = dict() if case["nvfp4"] else dict(fast_accum=case["fast_accum"])
        arguments = [moved(value, device) for value in (a, b, offs) if value is not None]
        options = {name: moved(value, device) for name, value in options.items()}
        return function(*arguments, **options, **more, impl=impl).cpu()

    return run


def to_reference(q):
    """As the reference takes it."""
    if isinstance(q, torch.Tensor):
        return to_numpy(q)
    if isinstance(q, hybrid_ops.Fp8Tensor):
        return q.data.contiguous().view(torch.uint8).numpy(), q.scale.numpy(), q.scaling, FP8_NAMES[q.data.dtype]
    data, scale, tensor_scale, layout = q
    return data.numpy(), scale.contiguous().view(torch.uint8).numpy(), tensor_scale.numpy(), layout


def check(case, run, budget_dtype=None):
    """`budget_dtype`: what the product's operands are widened to, where results are wider than that."""
    (a, b), offs, options = problem(case)
    rows = sum(case["sizes"]) + case["tail"]
    more = dict(batch_invariant=case["batch_invariant"], out_dtype=case["out_dtype"])
    if case["out"] is not None:
        out = torch.full((rows, case["N"]), float("nan"), dtype=case["out_dtype"])
        more["out"] = out if case["out"] == "fresh" else out.T.contiguous().T
    y = run(case, a, b, offs, **options, **more)
    assert y.dtype == case["out_dtype"]
    given = {n: to_numpy(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in options.items()}
    given = {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    ends = [] if offs is None else [offs.tolist()]
    family, module = ("nvfp4", gemm_nvfp4) if case["nvfp4"] else ("fp8", gemm_fp8)
    function = getattr(module, f"{family}_grouped_gemm" if case["grouped"] else f"{family}_gemm")
    ref = function(to_reference(a), to_reference(b), *ends, **given)
    assert_within("y", y, ref, baseline(case, a, b, offs, given, ref), budget_dtype or case["out_dtype"], axis=0)
    if offs is not None:
        assert not y[int(offs[-1]) :].any()


def baseline(case, a, b, offs, options, ref):
    """The reference's formula in float32: of several orders of the sum over K, the worst, see `orders_of_k`."""
    values_a, values_b = (gemm_nvfp4.values(to_reference(q), np.float32) for q in (a, b))
    options = dict(options)
    bias = options.pop("bias", None)
    if offs is None:
        values_b, ends = values_b[None], [len(values_a)]
    else:
        ends = offs.tolist()
    runs = []
    for k in orders_of_k(case, 200 if case["out_dtype"] == torch.float32 else 1):
        y = grouped_gemm(values_a[:, k], values_b[:, :, k], ends, **options, dtype=np.float32)[0]
        runs.append(y if bias is None else y + bias.astype(np.float32))
    return worst(runs, ref)
