import pytest
import torch
from torch.nn.functional import ScalingType, SwizzleType

from hybrid_ops.compat import torch as compat

from .budget import assert_within, to_numpy
from .compat_cases import randn, same, signature
from .tensors import int32

SWIZZLED, PLAIN = SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE


def test_signatures():
    assert signature(compat.grouped_mm) == "mat_a, mat_b, *, offs=None, bias=None, out_dtype=None"
    assert signature(compat.scaled_mm) == (
        "mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a=None, swizzle_b=None, bias=None, "
        "output_dtype=torch.bfloat16, contraction_dim=(), use_fast_accum=False"
    )
    assert signature(compat._scaled_mm) == (
        "input, mat2, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False"
    )


def test_signatures_are_those_of_torch():
    for name in ("grouped_mm", "scaled_mm"):
        assert signature(getattr(compat, name)) == signature(getattr(torch.nn.functional, name))


# grouped


def test_grouped_rows():
    a, b = randn(9, 5, seed=1), randn(3, 5, 4, seed=2)
    y = compat.grouped_mm(a, b, offs=int32(4, 4, 7))
    same(y, torch.cat([a[:4] @ b[0], a[4:7] @ b[2], torch.zeros(2, 4, dtype=torch.float64)]))


def test_grouped_columns():
    a, b = randn(3, 6, 5, seed=1), randn(5, 9, seed=2)
    y = compat.grouped_mm(a, b, offs=int32(4, 4, 7))
    same(y, torch.cat([a[0] @ b[:, :4], a[2] @ b[:, 4:7], torch.zeros(6, 2, dtype=torch.float64)], 1))


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matrices(transposed):
    a, b = randn(3, 6, 5, seed=1), randn(3, 5, 4, seed=2)
    a, b = (t.mT.contiguous().mT if transposed else t for t in (a, b))
    same(compat.grouped_mm(a, b), a @ b)


def test_grouped_out_dtype():
    a, b = randn(9, 5).bfloat16(), randn(2, 5, 4).bfloat16()
    assert compat.grouped_mm(a, b, offs=int32(4, 9)).dtype == torch.bfloat16
    y = compat.grouped_mm(a, b, offs=int32(4, 9), out_dtype=torch.float32)
    torch.testing.assert_close(y, torch.cat([a[:4].float() @ b[0].float(), a[4:].float() @ b[1].float()]))


def test_grouped_gradients():
    offs = int32(4, 9)
    for a, b, expected in (
        (randn(9, 5), randn(2, 5, 4), lambda a, b: torch.cat([a[:4] @ b[0], a[4:] @ b[1]])),
        (randn(2, 6, 5), randn(5, 9), lambda a, b: torch.cat([a[0] @ b[:, :4], a[1] @ b[:, 4:]], 1)),
    ):
        leaves = [a.requires_grad_(), b.requires_grad_()]
        y = compat.grouped_mm(*leaves, offs=offs)
        weight = randn(*y.shape, seed=9)
        same(*(torch.autograd.grad((result * weight).sum(), leaves) for result in (y, expected(*leaves))))


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ((4, 9), (9, 5), dict(offs=int32(4, 9)), r"must not both be 2-D.*hybrid_ops\.grouped_gemm"),
        ((9, 5), (2, 5, 4), dict(offs=int32(4, 9), bias=randn(4)), r"bias must be None.*hybrid_ops\.grouped_gemm"),
        ((9, 5), (2, 5, 4), {}, "offs must be given"),
        ((2, 9, 5), (2, 5, 4), dict(offs=int32(4, 9)), "offs must be None"),
        ((5,), (2, 5, 4), dict(offs=int32(4, 9)), "must be 2-D or 3-D, got 1-D and 3-D"),
    ],
)
def test_grouped_bad_input(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        compat.grouped_mm(randn(*a), randn(*b), **options)


# scaled

M, N, K = 160, 144, 288  # no multiples of 128


def positive(*shape, seed):
    return randn(*shape, seed=seed, dtype=torch.float32).exp()


def side(recipe, rows, seed, dtype=torch.float8_e4m3fn):
    """(codes, scales as (row tiles, K tiles), the values), all (rows, ..)."""
    data = randn(rows, K, seed=seed).to(dtype)
    height, width = {
        "TensorWise": (rows, K),
        "RowWise": (1, K),
        "BlockWise1x128": (1, 128),
        "BlockWise128x128": (128, 128),
    }[recipe.name]
    scale = positive(-(-rows // height), -(-K // width), seed=seed + 1)
    grid = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :K]
    return data, scale, data.double() * grid


def padded_k_first(scale):
    """(K tiles, up to a multiple of 4, row tiles), as torch wants blocks of 128x128."""
    return torch.nn.functional.pad(scale, (0, -scale.shape[1] % 4)).T


AS_TORCH_HAS_THEM = {
    "TensorWise": (lambda s: s.reshape(()), lambda s: s),
    "RowWise": (lambda s: s, lambda s: s.T),
    "BlockWise1x128": (lambda s: s, lambda s: s),
    "BlockWise128x128": (padded_k_first, padded_k_first),
}
RECIPES = [getattr(ScalingType, name) for name in AS_TORCH_HAS_THEM]


def close(got, expected):
    """Sums of 288 products in float32."""
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("recipe_b", RECIPES, ids=lambda r: r.name)
@pytest.mark.parametrize("recipe_a", RECIPES, ids=lambda r: r.name)
def test_scaled_recipes(recipe_a, recipe_b):
    (a, scale_a, left), (b, scale_b, right) = side(recipe_a, M, 1), side(recipe_b, N, 3)
    scale_a, scale_b = AS_TORCH_HAS_THEM[recipe_a.name][0](scale_a), AS_TORCH_HAS_THEM[recipe_b.name][1](scale_b)
    y = compat.scaled_mm(a, b.T, scale_a, recipe_a, scale_b, recipe_b, output_dtype=torch.float32)
    close(y, left @ right.T)
    lists = compat.scaled_mm(
        *(a, b.T, [scale_a], [recipe_a], [scale_b], [recipe_b], [PLAIN], [PLAIN]), output_dtype=torch.float32
    )
    assert lists.equal(y)


@pytest.mark.parametrize("recipe", [ScalingType.BlockWise1x128, ScalingType.BlockWise128x128], ids=lambda r: r.name)
def test_scaled_blocks_of_b_with_k_first(recipe):
    """As torch._scaled_mm and earlier versions of scaled_mm have them."""
    (a, scale_a, left), (b, scale_b, right) = side(ScalingType.RowWise, M, 1), side(recipe, N, 3)
    y = compat.scaled_mm(a, b.T, scale_a, ScalingType.RowWise, scale_b.T, recipe, output_dtype=torch.float32)
    close(y, left @ right.T)


def tensorwise(dtype_b=torch.float8_e4m3fn):
    recipe = ScalingType.TensorWise
    (a, scale_a, left), (b, scale_b, right) = side(recipe, M, 1), side(recipe, N, 3, dtype_b)
    return (a, b.T, scale_a, recipe, scale_b, recipe), left @ right.T


def test_scaled_bias():
    arguments, expected = tensorwise()
    close(compat.scaled_mm(*arguments, bias=randn(N).float(), output_dtype=torch.float32), expected + randn(N))


def test_scaled_output_dtype():
    arguments, expected = tensorwise(torch.float8_e5m2)
    for given, dtype in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        y = compat.scaled_mm(*arguments, output_dtype=given)
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected.to(dtype))
    assert compat.scaled_mm(*arguments).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="out_dtype must be one of"):
        compat.scaled_mm(*arguments, output_dtype=torch.float8_e4m3fn)


def test_scaled_contraction_dim():
    (a, b, *scales), expected = tensorwise()
    options = dict(output_dtype=torch.float32)
    close(compat.scaled_mm(a, b.T, *scales, **options, contraction_dim=[1, 1]), expected)
    close(compat.scaled_mm(a.T, b, *scales, **options, contraction_dim=(0, -2)), expected)
    close(compat.scaled_mm(a, b, *scales, **options, contraction_dim=(-1, 0)), expected)
    with pytest.raises(ValueError, match="contraction_dim must be"):
        compat.scaled_mm(a, b, *scales, contraction_dim=[2, 0])


@pytest.mark.parametrize("fast", [False, True])
def test_use_fast_accum(fast, monkeypatch):
    """It makes no difference without Hopper's tensor cores, so only that it is handed on."""
    given = []

    def spy(*args, fast_accum, **options):
        given.append(fast_accum)

    monkeypatch.setattr(compat, "fp8_gemm", spy)
    arguments, _ = tensorwise()
    compat.scaled_mm(*arguments, use_fast_accum=fast)
    a, b, scale_a, _, scale_b, _ = arguments
    compat._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)
    assert given == [fast, fast]


def swizzle(scale):
    """cuBLAS' layout of (rows, blocks): tiles of 128 x 4, within them row r at 16 (r % 32) + 4 (r // 32)."""
    rows, blocks = scale.shape
    flat = torch.zeros(-(-rows // 128), -(-blocks // 4), 32, 4, 4, dtype=scale.dtype)
    for r in range(rows):
        for c in range(blocks):
            flat[r // 128, c // 4, r % 32, r % 128 // 32, c % 4] = scale[r, c]
    return flat.flatten()


def mx_side(rows, seed):
    data = randn(rows, K, seed=seed).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 134, (rows, K // 32), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return data, exponents, data.double() * torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)


@pytest.mark.parametrize("swizzled", [False, True])
def test_scaled_mx(swizzled):
    (a, codes_a, left), (b, codes_b, right) = mx_side(M, 1), mx_side(N, 2)
    scale_a, scale_b = (
        (swizzle(codes) if swizzled else codes).view(torch.float8_e8m0fnu) for codes in (codes_a, codes_b)
    )
    recipe, layout = ScalingType.BlockWise1x32, SWIZZLED if swizzled else PLAIN
    y = compat.scaled_mm(a, b.T, scale_a, recipe, scale_b, recipe, layout, layout, output_dtype=torch.float32)
    close(y, left @ right.T)
    if swizzled:
        assert compat._scaled_mm(a, b.T, scale_a, scale_b, out_dtype=torch.float32).equal(y)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def fp4_side(rows, seed):
    """(codes, block scales, scale of the tensor, the values)."""
    codes = torch.randint(0, 256, (rows, K // 2), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    values = E2M1[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]
    scale, tensor_scale = positive(rows, K // 16, seed=seed).to(torch.float8_e4m3fn), torch.tensor([0.5 + seed])
    return codes, scale, tensor_scale, values * scale.double().repeat_interleave(16, 1)


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("levels", [1, 2])
def test_scaled_nvfp4(levels, swizzled):
    (a, block_a, tensor_a, left), (b, block_b, tensor_b, right) = fp4_side(M, 1), fp4_side(N, 2)
    expected = left @ right.T * (tensor_a * tensor_b if levels == 2 else 1)
    block_a, block_b = (swizzle(s) if swizzled else s for s in (block_a, block_b))
    a, b = (t.view(torch.float4_e2m1fn_x2) for t in (a, b))
    recipes = [ScalingType.BlockWise1x16, ScalingType.TensorWise][:levels]
    layouts = [SWIZZLED if swizzled else PLAIN, PLAIN][:levels]
    scales_a, scales_b = [block_a, tensor_a][:levels], [block_b, tensor_b][:levels]
    arguments = (a, b.T, scales_a, recipes, scales_b, recipes, layouts, layouts)
    close(compat.scaled_mm(*arguments, output_dtype=torch.float32), expected)
    y = compat.scaled_mm(*arguments, bias=randn(N).float(), output_dtype=torch.float32)
    close(y, expected + randn(N))
    if levels == 1 and swizzled:
        one = compat._scaled_mm(a, b.T, block_a, block_b, out_dtype=torch.float32)
        close(one, expected)
    with pytest.raises(ValueError, match="use_fast_accum must be False for float4"):
        compat.scaled_mm(*arguments, use_fast_accum=True)


V1 = {
    "TensorWise": (lambda s: s, lambda s: s.reshape(())),
    "RowWise": (lambda s: s, lambda s: s.T),
    "BlockWise1x128": (lambda s: s, lambda s: s.T),
    "BlockWise128x128": (lambda s: s, lambda s: s.T),
}


@pytest.mark.parametrize("recipe_b", RECIPES, ids=lambda r: r.name)
@pytest.mark.parametrize("recipe_a", RECIPES, ids=lambda r: r.name)
def test_v1_recipes(recipe_a, recipe_b):
    (a, scale_a, left), (b, scale_b, right) = side(recipe_a, M, 1), side(recipe_b, N, 3)
    scale_a, scale_b = V1[recipe_a.name][0](scale_a), V1[recipe_b.name][1](scale_b)
    bias = randn(N).float()
    close(compat._scaled_mm(a, b.T, scale_a, scale_b, out_dtype=torch.float32), left @ right.T)
    close(compat._scaled_mm(a, b.T, scale_a, scale_b, bias, out_dtype=torch.float32), left @ right.T + randn(N))
    if recipe_a == recipe_b and recipe_a in (ScalingType.TensorWise, ScalingType.RowWise):  # torch has a CPU path
        y = compat._scaled_mm(a, b.T, scale_a, scale_b, bias.bfloat16(), out_dtype=torch.bfloat16)
        theirs = torch._scaled_mm(a, b.T, scale_a, scale_b, bias.bfloat16(), out_dtype=torch.bfloat16)
        torch.testing.assert_close(y, theirs)


@pytest.mark.parametrize("out_dtype", [None, torch.float8_e4m3fn])
def test_v1_out_dtype(out_dtype):
    (a, b, scale_a, _, scale_b, _), _ = tensorwise()
    with pytest.raises(ValueError, match=r"out_dtype must be float32.*hybrid_ops\.fp8_quantize"):
        compat._scaled_mm(a, b, scale_a, scale_b, out_dtype=out_dtype)


def test_v1_scale_result():
    (a, b, scale_a, _, scale_b, _), _ = tensorwise()
    with pytest.raises(ValueError, match=r"scale_result must be None.*hybrid_ops\.fp8_quantize"):
        compat._scaled_mm(a, b, scale_a, scale_b, scale_result=scale_a, out_dtype=torch.bfloat16)


ONE = torch.ones(())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: ScalingType.BlockWise1x16}, "must both be float8 or float4: hybrid_ops.nvfp4_gemm"),
        ({3: [ScalingType.TensorWise] * 2}, "scale_a and scale_recipe_a must be as many, got 1 and 2"),
        ({2: [ONE, ONE], 3: [ScalingType.TensorWise] * 2}, "scale_recipe_a must be one that torch has"),
        ({5: ScalingType.BlockWise1x128}, "scale_b must have shape .* for BlockWise1x128"),
        ({5: ScalingType.BlockWise128x128}, "scale_b must have shape .* for BlockWise128x128"),
        ({6: SWIZZLED}, "swizzle_a must be NO_SWIZZLE with TensorWise"),
        ({0: torch.ones(2, 3, 4)}, "mat_a and mat_b must be 2-D"),
    ],
)
def test_scaled_bad_input(change, message):
    arguments = dict(enumerate([*tensorwise()[0], None])) | change
    if change.get(3) == ScalingType.BlockWise1x16:
        arguments[2] = torch.ones(M, K // 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=message):
        compat.scaled_mm(*arguments.values())


def test_v1_shapes_of_scales():
    (a, b, scale_a, _, _, _), _ = tensorwise()
    with pytest.raises(ValueError, match="scale_b must be of a tensor, of 144 rows or of blocks"):
        compat._scaled_mm(a, b, scale_a, torch.ones(3, 5), out_dtype=torch.bfloat16)


# on a GPU, beside the original


def within(y, left, right, dtype):
    products = [to_numpy(left.to(d) @ right.to(d)) for d in (torch.float64, torch.float32)]
    assert_within("y", y, *products, dtype, axis=0)


@pytest.mark.gpu
def test_beside_grouped_mm():
    a, b = (randn(*shape, seed=1).to("cuda", torch.bfloat16) for shape in ((96, 64), (2, 64, 32)))
    offs = int32(32, 96).cuda()
    y, theirs = (f(a, b, offs=offs) for f in (compat.grouped_mm, torch.nn.functional.grouped_mm))
    for rows, matrix in ((slice(32), b[0]), (slice(32, 96), b[1])):
        within(y[rows], a[rows].cpu(), matrix.cpu(), torch.bfloat16)
    torch.testing.assert_close(y, theirs, rtol=2**-7, atol=2**-7)  # a rounding apart


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES[:2], ids=lambda r: r.name)
def test_beside_scaled_mm(recipe):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("torch.nn.functional.scaled_mm needs float8 tensor cores")
    (a, scale_a, left), (b, scale_b, right) = side(recipe, M, 1), side(recipe, N, 3)
    scale_a, scale_b = AS_TORCH_HAS_THEM[recipe.name][0](scale_a), AS_TORCH_HAS_THEM[recipe.name][1](scale_b)
    a, b, scale_a, scale_b = (t.cuda() for t in (a, b, scale_a, scale_b))
    arguments = (a, b.T, scale_a, recipe, scale_b, recipe)
    y, theirs = compat.scaled_mm(*arguments), torch.nn.functional.scaled_mm(*arguments)
    within(y, left, right.T, torch.bfloat16)
    torch.testing.assert_close(y, theirs, rtol=2**-6, atol=2**-6 * float(y.abs().max()))
