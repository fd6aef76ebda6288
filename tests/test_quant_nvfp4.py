"""nvfp4_quantize and nvfp4_dequantize: NumPy, torch and Triton give the same bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrid_ops
from hybrid_ops.reference import quant_nvfp4 as reference

from .quant_cases import DTYPES, cases, check_exact, check_graph, float32, make, rounded_to, same_bytes, same_values
from .tensors import to_device

OPTIONS = dict(
    block=st.sampled_from(["1x16", "16x16"]),
    mode=st.sampled_from(["te", "modelopt"]),
    rounding=st.sampled_from(["nearest", "nearest", "stochastic"]),
    hadamard=st.booleans(),
    four_over_six=st.sampled_from([None, None, "mse", "mae"]),
    scale_layout=st.sampled_from(["linear", "128x4"]),
    orientation=st.sampled_from(["row", "column", "both"]),
)
SEED = 0x0123_4567_89AB_CDEF


def options_of(draw_from):
    """All options, without the one pair that does not go together."""
    return st.fixed_dictionaries(draw_from).map(
        lambda o: o | dict(four_over_six=None) if o["rounding"] == "stochastic" else o
    )


def check(case, options, impl, device="cpu", tensor_scale=None):
    x = make(case, multiple=16 if options["orientation"] != "row" else 1)
    stochastic = options["rounding"] == "stochastic"
    got = hybrid_ops.nvfp4_quantize(
        to_device(x, device),
        **options,
        seed=torch.tensor([SEED], device=device) if stochastic else None,
        tensor_scale=None if tensor_scale is None else tensor_scale.to(device),
        impl=impl,
    )
    expected = reference.nvfp4_quantize(
        float32(x),
        **options,
        seed=SEED if stochastic else None,
        tensor_scale=None if tensor_scale is None else tensor_scale.numpy(),
        round_hadamard=rounded_to(case["dtype"]),
    )
    for q, (data, scale, t) in (
        [(got, expected)] if options["orientation"] != "both" else zip(got, expected, strict=True)
    ):
        same_parts(q, (data, scale, t))
        assert q.scale_layout == options["scale_layout"]
        for to in DTYPES:
            y = hybrid_ops.nvfp4_dequantize(q, dtype=to, impl=impl)
            same_values("y", y, reference.nvfp4_dequantize(data, scale, t, scale_layout=q.scale_layout))


def same_parts(q, expected):
    for name, tensor, array in zip(("data", "scale", "tensor_scale"), q[:3], expected, strict=True):
        same_bytes(name, tensor, array)


@given(case=cases(), options=options_of(OPTIONS))
def test_bytes(case, options):
    check(case, options, "torch")


def some_scale(case, per_matrix):
    generator = torch.Generator().manual_seed(case["seed"])
    shape = case["lead"] if per_matrix else ()
    scale = torch.rand(shape, generator=generator) * 10.0 ** torch.randint(-44, 36, shape, generator=generator)
    return scale.clamp(min=2.0**-149)


@given(case=cases(), options=options_of(OPTIONS), per_matrix=st.booleans())
def test_given_tensor_scale(case, options, per_matrix):
    check(case, options, "torch", tensor_scale=some_scale(case, per_matrix))


@pytest.mark.parametrize("mode", ["te", "modelopt"])
def test_every_half_precision_value(mode):
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1).expand(-1, 16) * 1
        x[:, 1::2] = 1.0
        for t in (None, torch.tensor(2.0**-9)):
            q = hybrid_ops.nvfp4_quantize(x, mode=mode, tensor_scale=t)
            data, scale, _ = reference.nvfp4_quantize(float32(x), mode=mode, tensor_scale=t)
            same_bytes("data", q.data, data)
            same_bytes("scale", q.scale, scale)


def test_special_values():
    """What the docs promise of zeros, infinities and NaN."""
    inf, nan = float("inf"), float("nan")

    def codes(row, **options):
        q = hybrid_ops.nvfp4_quantize(torch.tensor([row + [0.0] * (16 - len(row))]), **options)
        return reference.unpack(q.data.numpy())[0, : len(row)].tolist(), float(q.scale.float()), float(q.tensor_scale)

    assert codes([0.0, -0.0]) == ([0, 0], 0.0, 1.0)
    assert codes([0.0, -0.0], mode="modelopt") == ([0, 0], 1.0, 1.0)
    for mode in ("te", "modelopt"):
        assert codes([inf, -inf, nan, -nan, 1.0], mode=mode) == ([7, 15, 7, 7, 0], 448.0, 1.0)
        assert codes([6.0, -6.0, nan, -0.1], mode=mode)[0] == [7, 15, 7, 8]  # below zero keeps its sign


def test_low_nibble_first():
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 1] = 6.0, -3.0
    assert int(hybrid_ops.nvfp4_quantize(x).data[0, 0]) == 0xD7  # 6 is 7, -3 is 13


def test_square_blocks_agree_with_the_transpose():
    x = torch.randn(64, 48)
    a = hybrid_ops.nvfp4_dequantize(hybrid_ops.nvfp4_quantize(x, block="16x16"))
    b = hybrid_ops.nvfp4_dequantize(hybrid_ops.nvfp4_quantize(x, block="16x16", orientation="column"))
    assert torch.equal(a, b.T)


def test_hadamard_cancels_in_a_product():
    x, y = torch.randn(2, 8, 64, dtype=torch.float64)
    products = [reference.hadamard16(t.numpy()) for t in (x, y)]
    np.testing.assert_allclose(products[0] @ products[1].T, x @ y.T, atol=1e-6)  # SIGNS are float32, exact


@pytest.mark.parametrize("options", [dict(mode="te"), dict(mode="modelopt"), dict(block="16x16"), dict(hadamard=True)])
def test_error_of_a_round_trip(options):
    """Independent of the reference: half of E2M1's coarsest step times the block scale, which is within 2^-4 of it."""
    x = torch.randn(64, 256, dtype=torch.float64).float()
    q = hybrid_ops.nvfp4_quantize(x, **options)
    y = hybrid_ops.nvfp4_dequantize(q, dtype=torch.float32)
    target = torch.from_numpy(reference.hadamard16(x.numpy())) if "hadamard" in options else x
    blocks = target.unflatten(-1, (-1, 16)).abs().amax(-1).repeat_interleave(16, -1)
    if "block" in options:
        blocks = blocks.unflatten(0, (-1, 16)).amax(1).repeat_interleave(16, 0)
    assert ((y - target).abs() <= blocks / 6 * (1 + 2.0**-4)).all()


@pytest.mark.parametrize("kind", ["mse", "mae"])
@pytest.mark.parametrize("mode", ["te", "modelopt"])
def test_four_over_six_has_the_smaller_error(kind, mode):
    x = torch.randn(256, 256)

    def error(**options):
        difference = hybrid_ops.nvfp4_dequantize(
            hybrid_ops.nvfp4_quantize(x, mode=mode, **options), dtype=torch.float32
        )
        difference = (difference - x).double().abs()
        return float((difference if kind == "mae" else difference.square()).mean())

    assert error(four_over_six=kind) < error()


def test_stochastic_rounding_keeps_the_mean():
    x = torch.full((64, 64), 0.3)
    x[:, ::16] = 6.0
    q = hybrid_ops.nvfp4_quantize(x, rounding="stochastic", seed=torch.tensor([7]))
    y = hybrid_ops.nvfp4_dequantize(q, dtype=torch.float32)[:, 1::16]
    assert y.unique().tolist() == pytest.approx([0.0, 0.5])
    assert abs(y.mean() - 0.3) < 5 * 0.25 / 16  # five standard deviations of the mean of 256
    other = hybrid_ops.nvfp4_quantize(x, rounding="stochastic", seed=torch.tensor([8]))
    assert not torch.equal(other.data, q.data)


@given(lead=st.sampled_from([(), (2,), (0,)]), M=st.integers(0, 300), S=st.integers(0, 9), seed=st.integers(0, 99))
def test_swizzle(lead, M, S, seed):
    scale = torch.randint(0, 256, (*lead, M, S), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    flat = hybrid_ops.swizzle_scales(scale)
    same_bytes("flat", flat, reference.swizzle_scales(scale.numpy()))
    assert torch.equal(hybrid_ops.unswizzle_scales(flat, M, S), scale)
    e4m3 = scale.view(torch.float8_e4m3fn)
    assert hybrid_ops.swizzle_scales(e4m3).dtype == torch.float8_e4m3fn
    if M % 128 == 0 and S % 4 == 0:  # torch's own form of this layout
        tiles = scale.view(*lead, M // 128, 128, S // 4, 4).transpose(-3, -2).reshape(*lead, M * S // 512, 4, 32, 4)
        assert torch.equal(flat, tiles.transpose(-3, -2).reshape(*lead, M * S))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x="x"), TypeError, "x must be a torch.Tensor, got str"),
        (dict(x=torch.ones(16)), ValueError, r"x must have shape \(..., M, K\), got \(16,\)"),
        (dict(x=torch.ones(3, 24)), ValueError, r"x must have K \(.*\) divisible by 16, got \(3, 24\)"),
        (dict(orientation="both"), ValueError, r"x must have M \(.*\) divisible by 16, got \(3, 32\)"),
        (dict(x=torch.ones(3, 16).double()), TypeError, "x must have dtype float32 or .*, got float64"),
        (dict(x=torch.ones(3, 16, requires_grad=True)), ValueError, "x must not require a gradient"),
        (dict(block="32x1"), ValueError, "block must be one of '1x16', '16x16', got '32x1'"),
        (dict(mode="vllm"), ValueError, "mode must be one of 'te', 'modelopt', got 'vllm'"),
        (dict(four_over_six="max"), ValueError, "four_over_six must be one of None, 'mse', 'mae', got 'max'"),
        (dict(scale_layout="8x4"), ValueError, "scale_layout must be one of 'linear', '128x4', got '8x4'"),
        (dict(orientation="up"), ValueError, "orientation must be one of"),
        (dict(rounding="up"), ValueError, "rounding must be one of 'nearest', 'stochastic', got 'up'"),
        (dict(rounding="stochastic"), ValueError, r"seed must be a \(1,\) int64 tensor with .*, got None"),
        (dict(seed=torch.tensor([1])), ValueError, "seed must be None with rounding='nearest', got a tensor"),
        (dict(rounding="stochastic", seed=torch.tensor([1.0])), TypeError, "seed must have dtype int64, got float32"),
        (
            dict(rounding="stochastic", seed=torch.tensor([1]), four_over_six="mse"),
            ValueError,
            "four_over_six must be None with rounding='stochastic', got 'mse'",
        ),
        (dict(tensor_scale=torch.ones(3)), ValueError, r"tensor_scale must have shape \(\), got \(3,\)"),
        (dict(tensor_scale=torch.tensor(-1.0)), ValueError, "tensor_scale must be positive and finite, got -1.0"),
        (dict(impl="fast"), ValueError, "impl must be one of"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(x=torch.randn(3, 32)) | change
    with pytest.raises(error, match=message):
        hybrid_ops.nvfp4_quantize(arguments.pop("x"), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(data=torch.ones(3, 16)), TypeError, "data must have dtype uint8, got float32"),
        (dict(data=torch.ones(3, 12, dtype=torch.uint8)), ValueError, r"data must have K / 2 .*, got \(3, 12\)"),
        (dict(scale=torch.ones(3, 1).to(torch.float8_e4m3fn)), ValueError, r"scale must have shape \(3, 2\), got"),
        (dict(scale_layout="128x4"), ValueError, r"scale must have shape \(512,\), got \(3, 2\)"),
        (dict(scale_layout="8x4"), ValueError, "scale_layout must be one of"),
        (dict(tensor_scale=torch.ones(1)), ValueError, r"tensor_scale must have shape \(\), got \(1,\)"),
    ],
)
def test_bad_nvfp4_tensor(change, error, message):
    with pytest.raises(error, match=message):
        hybrid_ops.nvfp4_dequantize(hybrid_ops.nvfp4_quantize(torch.randn(3, 32))._replace(**change))


def test_bad_scales():
    with pytest.raises(TypeError, match="scale must have dtype float8_e4m3fn or uint8, got float32"):
        hybrid_ops.swizzle_scales(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"scale must have shape \(512,\), got \(500,\)"):
        hybrid_ops.unswizzle_scales(torch.ones(500, dtype=torch.uint8), 3, 4)


def test_opcheck():
    x = torch.randn(2, 48, 20).transpose(1, 2)
    data, scale, t = (torch.empty(2, 20, 24).byte(), torch.empty(2, 20, 3).byte(), torch.empty(2))
    op, seed = torch.ops.hybrid_ops.nvfp4_quantize.default, torch.tensor([3])
    rest = (data, scale, t, "1x16", "te", None, True, "linear", "torch")
    torch.library.opcheck(op, (x, None, None, *rest))
    torch.library.opcheck(op, (x, None, seed, *rest))
    torch.library.opcheck(op, (x, t, None, data, scale, None, "16x16", "modelopt", "mse", False, "linear", "torch"))
    q = hybrid_ops.nvfp4_quantize(x)
    op = torch.ops.hybrid_ops.nvfp4_dequantize.default
    torch.library.opcheck(
        op, (q.data, q.scale.view(torch.uint8), q.tensor_scale, torch.empty(2, 20, 48), "linear", "torch")
    )


def round_trip(x, seed):
    q = hybrid_ops.nvfp4_quantize(x, rounding="stochastic", seed=seed, scale_layout="128x4")
    linear = hybrid_ops.unswizzle_scales(q.scale, x.shape[0], x.shape[1] // 16)
    return hybrid_ops.nvfp4_dequantize(q._replace(scale=linear, scale_layout="linear"), dtype=torch.float32)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend, compile_once):
    compile_once(round_trip, backend, lambda n: (torch.randn(n, 32), torch.tensor([n])), grads=(False,))


def nibbles_swapped(data, scale, t):
    return data >> 4 | data << 4, scale, t


def block_scales_shifted(data, scale, t):
    return data, np.roll(scale, 1, -1), t


def tensor_scale_of_the_neighbour(data, scale, t):
    return data, scale, t[::-1].copy()


def scales_swizzled_twice(data, scale, t):
    return data, reference.swizzle_scales(scale)[..., : scale[0].size].reshape(scale.shape), t


@pytest.mark.parametrize(
    "mutant", [nibbles_swapped, block_scales_shifted, tensor_scale_of_the_neighbour, scales_swizzled_twice]
)
def test_mutants_are_rejected(mutant):
    x = torch.randn(2, 8, 64)
    q = hybrid_ops.nvfp4_quantize(x)
    wrong = mutant(*reference.nvfp4_quantize(x.numpy()))
    with pytest.raises(AssertionError, match="differ"):
        same_parts(q, wrong)


@pytest.mark.parametrize(
    "change", [dict(mode="modelopt"), dict(hadamard=True), dict(four_over_six="mse"), dict(block="16x16")]
)
def test_every_option_changes_bytes(change):
    """An option that is ignored everywhere, the reference included, would pass all comparisons."""
    x = torch.randn(32, 64)
    x[:16, :16] = 0  # where the modes differ for certain
    a, b = hybrid_ops.nvfp4_quantize(x, **change), hybrid_ops.nvfp4_quantize(x)
    assert not (torch.equal(a.data, b.data) and torch.equal(a.scale.float(), b.scale.float()))


@pytest.mark.interpreter
@settings(max_examples=30)
@given(case=cases(), options=options_of(OPTIONS))
def test_bytes_interpreter(case, options):
    check(case, options, "triton")


@pytest.mark.interpreter
@settings(max_examples=15)
@given(case=cases(), options=options_of(OPTIONS), per_matrix=st.booleans())
def test_given_tensor_scale_interpreter(case, options, per_matrix):
    check(case, options, "triton", tensor_scale=some_scale(case, per_matrix))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@settings(max_examples=50)
@given(case=cases(max_rows=300, max_blocks=60), options=options_of(OPTIONS))
def test_bytes_gpu(impl, case, options):
    check(case, options, impl, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@settings(max_examples=13)
@given(case=cases(max_rows=300, max_blocks=60), options=options_of(OPTIONS), per_matrix=st.booleans())
def test_given_tensor_scale_gpu(impl, case, options, per_matrix):
    check(case, options, impl, "cuda", tensor_scale=some_scale(case, per_matrix))


@pytest.mark.gpu
def test_cuda_graph():
    x = torch.randn(304, 512, device="cuda", dtype=torch.bfloat16)
    seed = torch.tensor([5], device="cuda")
    for options in (dict(hadamard=True, scale_layout="128x4"), dict(rounding="stochastic", seed=seed)):
        layout = options.get("scale_layout", "linear")
        check_graph(
            x,
            lambda options=options: hybrid_ops.nvfp4_quantize(x, **options)[:3],
            lambda q, layout=layout: hybrid_ops.nvfp4_dequantize(hybrid_ops.Nvfp4Tensor(*q, layout)),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_many_elements_gpu(layout):
    """More than 2^31 elements: the last rows are as if they stood alone."""
    x = torch.zeros(2**15 + 128, 2**16, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-128:].normal_()
    q, alone = (hybrid_ops.nvfp4_quantize(t, scale_layout=layout) for t in (x, x[-128:].clone()))
    assert torch.equal(q.data[-128:], alone.data)
    assert torch.equal(q.scale[-len(alone.scale) :].view(torch.uint8), alone.scale.view(torch.uint8))
    assert torch.equal(hybrid_ops.nvfp4_dequantize(q)[-128:], hybrid_ops.nvfp4_dequantize(alone))


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles(sm, monkeypatch):
    from hybrid_ops.triton_kernels import quant_nvfp4 as kernels

    from .triton_targets import check as check_fits
    from .triton_targets import compiling_for

    x, byte = torch.empty(2, 256, 4096, dtype=torch.bfloat16), torch.empty(2, 256, 2048, dtype=torch.uint8)
    seed, t = torch.empty(1, dtype=torch.int64), torch.empty(2)
    wide = (
        (x.mT, None, "1x16", "te", None, True, "linear"),
        (x, seed, "1x16", "te", None, False, "linear"),
        (x, None, "1x16", "te", "mse", False, "linear"),
        (x, None, "16x16", "modelopt", "mae", False, "linear"),
    )
    with compiling_for(sm, monkeypatch) as compiled:
        for source, bits, *options in (
            (x, None, "1x16", "te", None, False, "128x4"),
            *(wide if sm in (90, 100) else ()),
        ):
            kernels.nvfp4_quantize(source, None, bits, byte, byte, t, *options)
        kernels.nvfp4_dequantize(byte, byte, t, x, "linear")
    check_fits(compiled, sm)
    check_exact(compiled)
