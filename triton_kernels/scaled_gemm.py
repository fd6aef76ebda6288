"""Products of quantised matrices, dense and grouped: one kernel, whose operands are FP8, NVFP4 or plain.

The tiles are those of `grouped_gemm`, for experts and rows that only the device knows; a dense product has one expert.
FP8 tensor cores take FP8 operands as they are where there are any; everywhere else codes become floats by integer
arithmetic, exactly: in float16 they all fit, E2M1 times its E4M3 scale in bfloat16 too.

Letters: M rows, N columns, K inner size of a tile; R rows of a tile of either operand; S NVFP4 blocks along K.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped_gemm import Config, expert_tiles, find_tile, narrowed
from .launch import architecture, cdiv, launch, next_power_of_2, num_sms, on_device
from .minifloat import decode, decode_e8m0
from .quant_nvfp4 import swizzled

__all__ = ["config", "fp8_cores", "operand_dtype", "scaled_gemm", "step_of_scales"]

NVFP4 = ("linear", "128x4")
INNER_TILES = {"1x128": (1, 128), "128x128": (128, 128), "mx": (1, 32)}  # rows and columns of what shares a scale
FP8_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def step_of_scales(a_kind: str, b_kind: str) -> int:
    """After how many products along K a scale of a sum changes; 0 where none does."""
    return min((INNER_TILES[kind][1] for kind in (a_kind, b_kind) if kind in INNER_TILES), default=0)


def fp8_cores(tensor: Tensor) -> bool:
    """Whether there are FP8 tensor cores; the interpreter's arithmetic with FP8 is wrong."""
    return architecture(tensor) >= 89 and not triton.knobs.runtime.interpret


def operand_dtype(
    a_kind: str, b_kind: str, a_dtype: torch.dtype, out_dtype: torch.dtype, fast_accum: bool, fp8_cores: bool
) -> torch.dtype | None:
    """What the tensor cores multiply; None is FP8 as it is. Sums of 32 FP8 products have 14 bits: enough for bfloat16,
    for float16 (11 bits) only where asked for, for float32 never."""
    if a_kind == "plain":
        return a_dtype
    enough = out_dtype == torch.bfloat16 or (fast_accum and out_dtype == torch.float16)
    native = fp8_cores and enough and a_kind not in NVFP4 and b_kind not in NVFP4
    return None if native else torch.float16


@functools.cache
def config(
    rows: int,
    experts: int,
    n: int,
    operands: torch.dtype | None,
    step: int,
    gated: bool,
    batch_invariant: bool,
) -> Config:
    """By the rows of an average expert, as in `grouped_gemm`. What is decoded passes through registers, so tiles are
    smaller. With batch_invariant the rows do not matter."""
    mean = 128 if batch_invariant else rows / max(experts, 1)
    block_k = 128 if operands is None else 64
    if operands == torch.float32:
        chosen = Config(32, 64, 32, 8, 4, 2, 2)  # on sm_100 Triton makes TF32 of 64 rows, whatever the precision
    elif mean <= 16:
        chosen = Config(16, 64, block_k, 8, 4, 3, 2)
    elif mean <= 64:
        chosen = Config(64, 64, block_k, 8, 4, 3, 2)
    else:
        chosen = Config(128, 128 if operands is None and step == 0 and not gated else 64, block_k, 8, 8, 3, 1)
    if step == 32:
        chosen = chosen._replace(BLOCK_K=32)
    if mean <= 64:
        chosen = narrowed(chosen, rows, experts, n)
    return chosen._replace(BLOCK_N=chosen.BLOCK_N // 2) if gated else chosen


@triton.jit
def load_nvfp4(
    data, scale, row, k_start, K, stride_m, stride_k, scale_stride_m, scale_stride_k,
    DTYPE: tl.constexpr, SWIZZLED: tl.constexpr, EVEN_K: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[R, K]: code * block scale, exact in DTYPE."""
    S: tl.constexpr = BLOCK_K // 16
    byte = k_start // 2 + tl.arange(0, BLOCK_K // 2)
    block = k_start // 16 + tl.arange(0, S)
    pointers = data + row[:, None] * stride_m + byte.to(tl.int64)[None, :] * stride_k
    if SWIZZLED:
        places = scale + swizzled(row[:, None], block[None, :], K // 16) * scale_stride_m
    else:
        places = scale + row[:, None] * scale_stride_m + block.to(tl.int64)[None, :] * scale_stride_k
    if EVEN_K:
        codes, b = tl.load(pointers), tl.load(places)
    else:
        codes = tl.load(pointers, (byte < K // 2)[None, :], other=0)
        b = tl.load(places, (block < K // 16)[None, :], other=0)
    codes = codes.to(tl.int32)
    codes = tl.reshape(tl.join(codes & 15, codes >> 4), [R, S, 16])
    values = decode(codes, "e2m1") * decode(b.to(tl.int32), "e4m3")[:, :, None]
    return tl.reshape(values.to(DTYPE), [R, BLOCK_K])


@triton.jit
def load_operand(
    data, scale, row, k_start, K, stride_m, stride_k, scale_stride_m, scale_stride_k, KIND: tl.constexpr,
    DTYPE: tl.constexpr, EVEN_K: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[R, K] of one operand as it is multiplied, without the scales that multiply sums; 0 beyond K.

    KIND is "plain" for what is loaded as it is, "e4m3" or "e5m2" for bytes, or a scale layout of NVFP4.
    """
    if KIND == "linear" or KIND == "128x4":
        strides = (stride_m, stride_k, scale_stride_m, scale_stride_k)
        return load_nvfp4(data, scale, row, k_start, K, *strides, DTYPE, KIND == "128x4", EVEN_K, R, BLOCK_K)
    else:
        k = k_start + tl.arange(0, BLOCK_K)
        pointers = data + row[:, None] * stride_m + k.to(tl.int64)[None, :] * stride_k
        if EVEN_K:
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, (k < K)[None, :], other=0.0)  # an integer is not cast to FP8 by Triton 3.6
        if KIND == "plain":
            return x
        else:
            return decode(x.to(tl.int32), KIND).to(DTYPE)


@triton.jit
def load_scale(scale, row, k_start, stride_m, stride_k, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """[R] float32: the scale of each row's products from k_start on; 1 without such scales. WIDTH 32 is E8M0."""
    if WIDTH == 0:
        return tl.full([row.shape[0]], 1.0, tl.float32)
    else:
        column = tl.full([], 1, tl.int64) * (k_start // WIDTH)
        s = tl.load(scale + row // HEIGHT * stride_m + column * stride_k)
        if WIDTH == 32:
            return decode_e8m0(s.to(tl.int32))
        else:
            return s


@triton.jit
def add_product(total, a, b, a_scale, b_scale, STEP: tl.constexpr, PRECISION: tl.constexpr, IMPRECISE: tl.constexpr):
    """total + a b^T, times the scales of these products where there are any. a [M, K], b [N, K]."""
    if STEP == 0:
        return tl.dot(a, tl.trans(b), total, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
    else:
        zero = tl.zeros_like(total)
        product = tl.dot(a, tl.trans(b), zero, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
        return total + product * a_scale[:, None] * b_scale[None, :]


@triton.jit(do_not_specialize=["rows", "rows_of_a"])
def scaled_gemm_kernel(
    a_ptr,
    a_inner_ptr,
    a_outer_ptr,
    b_ptr,
    b_inner_ptr,
    b_outer_ptr,
    offs_ptr,
    gather_ptr,
    bias_ptr,
    row_scale_ptr,
    out_ptr,
    rows,
    rows_of_a,
    num_experts,
    N,
    K,
    a_stride_m,
    a_stride_k,
    a_inner_stride_m,
    a_inner_stride_k,
    a_outer_stride_m,
    b_stride_e,
    b_stride_n,
    b_stride_k,
    b_inner_stride_e,
    b_inner_stride_n,
    b_inner_stride_k,
    b_outer_stride_e,
    b_outer_stride_n,
    out_stride_m,
    out_stride_n,
    A_KIND: tl.constexpr,
    A_HEIGHT: tl.constexpr,
    A_WIDTH: tl.constexpr,
    A_OUTER: tl.constexpr,
    B_KIND: tl.constexpr,
    B_HEIGHT: tl.constexpr,
    B_WIDTH: tl.constexpr,
    B_OUTER: tl.constexpr,
    DTYPE: tl.constexpr,
    STEP: tl.constexpr,
    HAS_OFFS: tl.constexpr,
    HAS_GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    RELU2: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    IMPRECISE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    n_tiles = tl.cdiv(N, BLOCK_N)
    if HAS_OFFS:
        ends, tile_ends = expert_tiles(offs_ptr, num_experts, rows, n_tiles, BLOCK_M, BLOCK_E)
    else:  # the only expert has all rows
        ends = tl.full([BLOCK_E], rows, tl.int32)
        tile_ends = tl.full([BLOCK_E], tl.cdiv(rows, BLOCK_M) * n_tiles, tl.int32)
    for tile in range(tl.program_id(0), tl.max(tile_ends), tl.num_programs(0)):
        expert, first_row, end, n_tile = find_tile(tile, ends, tile_ends, rows, n_tiles, BLOCK_M, GROUP_M)
        row = first_row + tl.arange(0, BLOCK_M)  # [M]
        n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]

        # rows and columns beyond the last are read from the last, and not stored
        a_row = tl.maximum(tl.minimum(row, end - 1), 0)
        if HAS_GATHER:
            source = tl.load(gather_ptr + a_row)
            a_row = tl.minimum(tl.maximum(source, 0), rows_of_a - 1)
        a_row = a_row.to(tl.int64)
        b_row = tl.minimum(n, N - 1).to(tl.int64)
        up_row = b_row + N  # of the gated product's second matrix
        e = tl.minimum(expert, num_experts - 1).to(tl.int64)
        b_data, b_inner = b_ptr + e * b_stride_e, b_inner_ptr + e * b_inner_stride_e
        a_strides = (a_stride_m, a_stride_k, a_inner_stride_m, a_inner_stride_k)
        b_strides = (b_stride_n, b_stride_k, b_inner_stride_n, b_inner_stride_k)

        h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = h
        for k in range(0, tl.where(expert < num_experts, K, 0), BLOCK_K):
            a = load_operand(a_ptr, a_inner_ptr, a_row, k, K, *a_strides, A_KIND, DTYPE, EVEN_K, BLOCK_M, BLOCK_K)
            a_scale = load_scale(a_inner_ptr, a_row, k, a_inner_stride_m, a_inner_stride_k, A_HEIGHT, A_WIDTH)
            b = load_operand(b_data, b_inner, b_row, k, K, *b_strides, B_KIND, DTYPE, EVEN_K, BLOCK_N, BLOCK_K)
            b_scale = load_scale(b_inner, b_row, k, b_inner_stride_n, b_inner_stride_k, B_HEIGHT, B_WIDTH)
            h = add_product(h, a, b, a_scale, b_scale, STEP, PRECISION, IMPRECISE)
            if GATED:
                b = load_operand(b_data, b_inner, up_row, k, K, *b_strides, B_KIND, DTYPE, EVEN_K, BLOCK_N, BLOCK_K)
                b_scale = load_scale(b_inner, up_row, k, b_inner_stride_n, b_inner_stride_k, B_HEIGHT, B_WIDTH)
                up = add_product(up, a, b, a_scale, b_scale, STEP, PRECISION, IMPRECISE)

        if A_OUTER:
            s = tl.load(a_outer_ptr + a_row * a_outer_stride_m)[:, None]
            h *= s
            up *= s
        if B_OUTER:
            b_outer = b_outer_ptr + e * b_outer_stride_e
            h *= tl.load(b_outer + b_row * b_outer_stride_n)[None, :]
            if GATED:
                up *= tl.load(b_outer + up_row * b_outer_stride_n)[None, :]
        if HAS_OFFS:  # rows of no expert, whose scales may be anything
            h = tl.where(expert < num_experts, h, 0.0)
            up = tl.where(expert < num_experts, up, 0.0)
        if HAS_GATHER:  # a row from outside a is 0
            inside = ((source >= 0) & (source < rows_of_a))[:, None]
            h = tl.where(inside, h, 0.0)
            up = tl.where(inside, up, 0.0)
        if HAS_BIAS:
            h += tl.load(bias_ptr + b_row).to(tl.float32)[None, :]
        if RELU2:
            h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
            h *= h
        if GATED:
            h = h * tl.sigmoid(h) * up
        if HAS_SCALE:
            h *= tl.load(row_scale_ptr + row, row < end, other=0.0)[:, None]
        pointers = out_ptr + row.to(tl.int64)[:, None] * out_stride_m + n.to(tl.int64)[None, :] * out_stride_n
        tl.store(pointers, h.to(out_ptr.dtype.element_ty), (row < end)[:, None] & (n < N)[None, :])


def scaled_gemm(
    a: Tensor,
    a_inner: Tensor | None,
    a_outer: Tensor | None,
    a_kind: str,
    b: Tensor,
    b_inner: Tensor | None,
    b_outer: Tensor | None,
    b_kind: str,
    offs: Tensor | None,
    gather: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    out: Tensor,
    activation: str | None,
    fast_accum: bool,
    batch_invariant: bool,
    chosen: Config | None = None,
) -> None:
    """Fill out (R, N); a (M, K), b (E, N, K). `chosen` is to measure other configurations."""
    (rows, n), experts = out.shape, b.shape[0]
    if out.numel() == 0:
        return
    if experts == 0 or a.shape[0] == 0:
        out.zero_()
        return
    k = a.shape[1] * (2 if a_kind in NVFP4 else 1)
    gated, step = activation == "silu_gated", step_of_scales(a_kind, b_kind)
    operands = operand_dtype(a_kind, b_kind, a.dtype, out.dtype, fast_accum, fp8_cores(a))
    c = chosen or config(rows, experts, n, operands, step, gated, batch_invariant)
    a_data, a_constants = _side(a, a_inner, a_outer, a_kind, operands)
    b_data, b_constants = _side(b, b_inner, b_outer, b_kind, operands)
    tensors = (  # out takes the place of what is not there
        a_data,
        out if a_inner is None else a_inner,
        out if a_outer is None else a_outer,
        b_data,
        out if b_inner is None else b_inner,
        out if b_outer is None else b_outer,
        out if offs is None else offs.contiguous(),
        out if gather is None else gather.contiguous(),
        out if bias is None else bias.contiguous(),
        out if row_scale is None else row_scale.contiguous(),
        out,
    )
    scalars = (
        rows,
        a.shape[0],
        experts,
        n,
        k,
        *a.stride(),
        *_strides(a_inner, 2),
        *_strides(a_outer, 1),
        *b.stride(),
        *_strides(b_inner, 3),
        *_strides(b_outer, 2),
        *out.stride(),
        *a_constants,
        *b_constants,
        tl.float16 if operands is None else TRITON[operands],
        step,
        offs is not None,
        gather is not None,
        bias is not None,
        row_scale is not None,
        activation == "relu2",
        gated,
        k % c.BLOCK_K == 0,
        "ieee" if operands == torch.float32 else "tf32",
        None if operands is not None or fast_accum else 32,
        2 if offs is None else next_power_of_2(experts + 1),
        c.BLOCK_M,
        c.BLOCK_N,
        c.BLOCK_K,
        c.GROUP_M,
    )
    most_tiles = (cdiv(rows, c.BLOCK_M) + (0 if offs is None else min(experts, rows) + 1)) * cdiv(n, c.BLOCK_N)
    grid = min(most_tiles, num_sms(a) * c.programs_per_sm)
    with on_device(a):
        launch(scaled_gemm_kernel, grid, tensors, scalars, num_warps=c.num_warps, num_stages=c.num_stages)


TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _side(
    data: Tensor, inner: Tensor | None, outer: Tensor | None, kind: str, operands: torch.dtype | None
) -> tuple[Tensor, tuple[object, ...]]:
    """The tensor that the kernel reads, and its constants for this operand."""
    height, width = INNER_TILES.get(kind, (1, 0))
    rest = (height, width, outer is not None)
    if kind == "plain" or kind in NVFP4:
        return data, (kind, *rest)
    if operands is None:
        return data, ("plain", *rest)
    return data.view(torch.uint8), (FP8_NAMES[data.dtype], *rest)


def _strides(scale: Tensor | None, dims: int) -> tuple[int, ...]:
    """0 for what one scale is for, and for what is not there."""
    if scale is None:
        return (0,) * dims
    found = [0 if size == 1 else stride for size, stride in zip(scale.shape, scale.stride(), strict=True)]
    return (*found, *(0,) * (dims - len(found)))
