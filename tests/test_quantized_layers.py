"""`Fp8Linear`, `Nvfp4Linear` and the weights that they and quantised experts hold."""

import copy

import pytest
import torch

from hybrid_ops.nn import Fp8Linear, Fp8Weight, Nvfp4Linear, Nvfp4Weight

from .quantized_folders import worth


def linear(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(48, 20, bias=bias, dtype=dtype)


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (0, 48), (2, 0, 48)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_nvfp4(shape, bias):
    plain = linear(bias)
    layer, x = Nvfp4Linear.from_linear(plain), torch.randn(shape)
    matrix = worth(layer.weight, layer.weight_scale, layer.weight_scale_2)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, matrix, plain.bias))
    assert layer.dequantize(torch.float32).equal(matrix)
    assert (matrix - plain.weight).abs().max() < 0.2 * plain.weight.abs().max()


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (0, 48)])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
@torch.no_grad()
def test_fp8(shape, scaling):
    plain = linear()
    layer, x = Fp8Linear.from_linear(plain, scaling=scaling), torch.randn(shape)
    matrix = worth(layer.weight, layer.weight_scale)
    assert layer.dequantize(torch.float32).equal(matrix)
    assert (matrix - plain.weight).abs().max() < 2**-4 * plain.weight.abs().max()  # half a step of E4M3
    scale = x.abs().amax(-1, keepdim=True) / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(rounded, matrix, plain.bias))


@torch.no_grad()
def test_fp8_with_a_static_scale():
    """Beyond 448 times the scale x saturates."""
    layer = Fp8Linear.from_linear(linear())
    layer.input_scale = torch.tensor(2.0**-9)
    x = torch.tensor([[0.5, 2.0, -2.0]]).repeat(1, 16)
    expected = torch.tensor([[0.5, 0.875, -0.875]]).repeat(1, 16)
    matrix = worth(layer.weight, layer.weight_scale)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(expected, matrix, layer.bias))


@pytest.mark.parametrize("kind", [Fp8Linear, Nvfp4Linear])
def test_the_format_stays(kind):
    layer = kind.from_linear(linear())
    stored = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.to("cpu")):
        moved = cast(copy.deepcopy(layer))
        for name, buffer in moved.named_buffers():
            assert buffer.dtype == stored[name].dtype
            assert buffer.view(torch.uint8).equal(stored[name].view(torch.uint8)) if buffer.dim() else True
    assert layer.half().bias.dtype == torch.float16
    assert all(buffer.is_meta for buffer in layer.to("meta").buffers())


@pytest.mark.parametrize("kind", [Fp8Linear, Nvfp4Linear])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtypes(kind, dtype):
    layer, x = kind.from_linear(linear(dtype=dtype)), torch.randn(3, 48, dtype=dtype)
    out, exact = layer(x), layer.float()(x.float())
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    with pytest.raises(TypeError, match="float64"):
        layer(x.double())


def test_state_dict():
    """The names of ModelOpt's checkpoints; what a state dict takes out, another layer takes in."""
    names = {"weight", "weight_scale", "bias"}
    fp8, nvfp4 = Fp8Linear.from_linear(linear()), Nvfp4Linear.from_linear(linear())
    assert fp8.state_dict().keys() == names
    assert nvfp4.state_dict().keys() == names | {"weight_scale_2"}
    x = torch.randn(3, 48)
    for layer, other in ((fp8, Fp8Linear(48, 20)), (nvfp4, Nvfp4Linear(48, 20))):
        other.load_state_dict(layer.state_dict())
        assert other(x).equal(layer(x))
    assert {"input_scale"} < Nvfp4Linear(48, 20, input_scale=True).state_dict().keys()


def test_shapes_of_experts():
    weight = Nvfp4Weight((4, 20, 48), input_scale=True, device="meta")
    shapes = {name: tuple(buffer.shape) for name, buffer in weight.named_buffers()}
    expected = dict(weight=(4, 20, 24), weight_scale=(4, 20, 3), weight_scale_2=(4,), input_scale=(4,))
    assert shapes == expected
    weight = Fp8Weight((4, 20, 48), scaling="row", device="meta")
    assert {n: tuple(b.shape) for n, b in weight.named_buffers()} == dict(weight=(4, 20, 48), weight_scale=(4, 20))
    assert "(4, 20, 48)" in repr(weight)


def test_bad_arguments():
    with pytest.raises(ValueError, match="scaling must be 'tensor' or 'row', got '1x128'"):
        Fp8Weight((20, 48), scaling="1x128")
    with pytest.raises(ValueError, match=r"shape must have K divisible by 16 for NVFP4, got \(20, 40\)"):
        Nvfp4Linear(40, 20)
    with pytest.raises(ValueError, match="must not require a gradient"):
        Nvfp4Linear.from_linear(linear())(torch.randn(3, 48, requires_grad=True))
