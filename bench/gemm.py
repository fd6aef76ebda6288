"""Products of FP8 and NVFP4 matrices: a dense layer's, and the first one of the routed experts."""

import itertools
from collections.abc import Iterator, Mapping

import torch

import hybrid_ops

from . import peers
from .cases import MOES, SHARDS, TOKENS, Case, Tensors, layer, mixer_of, moe_of, randn, sharded
from .grouped_gemm import choices, touched, weight

Format = tuple[str, str]  # of a and of b: "plain", a scaling of FP8, or a scale layout of NVFP4

FP8_ROW, FP8_BLOCK, FP8_TENSOR = ("row", "row"), ("1x128", "128x128"), ("row", "tensor")
W4A16, W4A8, W4A4 = ("plain", "linear"), ("row", "linear"), ("linear", "linear")
NAMES = {FP8_ROW: "row", FP8_BLOCK: "1x128", FP8_TENSOR: "tensor", W4A16: "w4a16", W4A8: "w4a8", W4A4: "w4a4"}
BYTES = {"plain": 2, "linear": 0.5 + 1 / 16, "1x128": 1 + 4 / 128}  # of an element, with its block's scale


def cases(on_gpu: bool) -> Iterator[Case]:
    if not on_gpu:
        for form in (FP8_ROW, FP8_BLOCK, W4A16, W4A8, W4A4):
            yield dense(256, 128, 128, form)
        for form in (FP8_TENSOR, W4A16):
            yield grouped("tiny", 256, form)
        return
    for rows in (8192, 64):  # the shared expert of Nemotron 3 Super
        for form in (FP8_ROW, FP8_BLOCK, W4A16, W4A8, W4A4):
            yield dense(rows, 5376, 4096, form)
    yield dense(8192, 5376, 4096, ("mx", "mx"))
    for model in ("nano3", "super"):
        for tokens in (8192, 64, 1):
            yield grouped(model, tokens, FP8_TENSOR)
            yield grouped(model, tokens, W4A16)


def sweep() -> Iterator[Case]:
    """The Mamba-2 layer's and the shared expert's products, and the first of the routed experts."""
    for model, tp in itertools.product(MOES, SHARDS):
        mixer, moe = mixer_of(model, tp), moe_of(model, tp)
        layers = ((mixer.in_proj, mixer.hidden), (mixer.hidden, mixer.inner), (moe.shared, moe.hidden))
        for rows, (n, k) in itertools.product((1, 64, 512, 8192), layers):
            for form in (FP8_ROW, FP8_BLOCK, W4A16):
                yield dense(rows, n, k, form)
        for tokens, form in itertools.product(TOKENS, (FP8_TENSOR, W4A16)):
            yield grouped(model, tokens, form, tp)


def dense(rows: int, n: int, k: int, form: Format) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        return parts("a", randn(generator, rows, k), form[0]) | parts("b", weight(generator, n, k), form[1])

    def call(t: Tensors, impl: str, **options: torch.dtype) -> Tensors:
        product = hybrid_ops.nvfp4_gemm if form[1] == "linear" else hybrid_ops.fp8_gemm
        return {"y": product(matrix(t, "a", form[0]), matrix(t, "b", form[1]), **options, impl=impl)}

    return Case(
        op="nvfp4_gemm" if form[1] == "linear" else "fp8_gemm",
        public="nvfp4_gemm" if form[1] == "linear" else "fp8_gemm",
        name=f"{rows}x{n}x{k}-{NAMES.get(form, form[0])}",
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call(t, "torch", out_dtype=torch.float32),
        axis={"y": 0},
        bytes=round(rows * k * BYTES.get(form[0], 1) + n * k * BYTES.get(form[1], 1)) + 2 * rows * n,
        flops=2 * rows * n * k,
        rate=rate(form),
        impls=("triton",),
        problem={"rows": rows, "n": n, "k": k} | scaling(form),
        peers=others(form, rows),
    )


def others(form: Format, rows: int) -> peers.Peers:
    if form == FP8_BLOCK:
        return peers.fp8_block()
    return peers.fp8_row() if form == FP8_ROW and rows > 256 else {}


def grouped(model: str, tokens: int, form: Format, tp: int = 1) -> Case:
    """Rows gathered from the tokens, squared ReLU behind."""
    moe = moe_of(model, tp)
    k, n, rows = moe.latent or moe.hidden, moe.expert, tokens * moe.topk

    def make(device: torch.device, generator: torch.Generator) -> Tensors:
        routing = choices(generator, tokens, moe)
        b = parts("b", weight(generator, moe.num_experts, n, k), form[1])
        rest = {"offs": routing.offs, "gather": routing.token_index}
        return parts("a", randn(generator, tokens, k), form[0]) | b | rest

    def call(t: Tensors, impl: str, **options: torch.dtype) -> Tensors:
        product = hybrid_ops.nvfp4_grouped_gemm if form[1] == "linear" else hybrid_ops.fp8_grouped_gemm
        matrices = matrix(t, "a", form[0]), matrix(t, "b", form[1])
        return {"y": product(*matrices, t["offs"], gather=t["gather"], activation="relu2", **options, impl=impl)}

    op = "nvfp4_grouped_gemm" if form[1] == "linear" else "fp8_grouped_gemm"
    weights = touched(tokens, moe) * n * k
    return Case(
        op=op,
        public=op,
        name=layer(model, tokens, "up", NAMES[form], *sharded(tp)),
        dtype=torch.bfloat16,
        make=make,
        call=call,
        expected=lambda t: call(t, "torch", out_dtype=torch.float32),
        axis={"y": 0},
        bytes=round(tokens * k * BYTES.get(form[0], 1) + weights * BYTES.get(form[1], 1)) + 2 * rows * n,
        flops=2 * rows * n * k,
        rate=rate(form),
        impls=("triton",),
        problem={"rows": rows, "experts": moe.num_experts, "n": n, "k": k} | scaling(form),
    )


def parts(name: str, x: torch.Tensor, form: str) -> Tensors:
    """The tensors of x in a format, as a case keeps them."""
    if form == "plain":
        return {name: x}
    q = hybrid_ops.nvfp4_quantize(x) if form == "linear" else hybrid_ops.fp8_quantize(x, form)
    return {f"{name}.{part}": t for part, t in q._asdict().items() if isinstance(t, torch.Tensor)}


def matrix(t: Tensors, name: str, form: str) -> object:
    """The same as the op takes them."""
    if form == "plain":
        return t[name]
    found = {key.removeprefix(f"{name}."): value for key, value in t.items() if key.startswith(f"{name}.")}
    if form == "linear":
        return hybrid_ops.Nvfp4Tensor(**found, scale_layout=form)
    return hybrid_ops.Fp8Tensor(**found, scaling=form)


def rate(form: Format) -> str:
    """Which matrix rate bounds the product: with two operands of at most 8 bits that of FP8."""
    return "bf16_tflops" if form[0] == "plain" else "fp8_tflops"


def scaling(form: Format) -> Mapping[str, str]:
    return {} if "linear" in form else {"scaling": form[0]}
