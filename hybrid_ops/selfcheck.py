"""`hybrid-ops check`: every public op on this machine against the NumPy reference, in units of its error budget.

Triton kernels run on the GPU; without one in Triton's interpreter, which has to be a process of its own:
`TRITON_INTERPRET=1 python -m hybrid_ops.selfcheck OP ...` prints their rows as JSON.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import hybrid_ops

from . import _device
from .budget import Measure, measure, round_to, to_numpy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETER_DTYPES = (torch.float32, torch.float16)  # the interpreter's bfloat16 arithmetic is wrong
IMPLS = ("torch", "triton", "cuda")


@dataclass
class Row:
    """One implementation of one op; `ratio` is its error / budget by dtype, absent where it did not run."""

    op: str
    impl: str
    where: str
    ratio: dict[str, float]
    complaints: list[str]
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        return not self.complaints


@dataclass
class Problem:
    """A call of a public function, and of its reference in `hybrid_ops.reference.<module>`.

    `axis` names the results in their order, a tensor that is updated in place by its own name, and says along which
    axis (heads, channels or rows) the error is taken for each slice by itself.
    """

    module: str
    tensors: dict[str, Tensor]
    axis: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    also_return: dict[str, bool] = field(default_factory=dict)  # what the reference always returns
    store: torch.dtype | None = None  # of what a layer of several ops keeps between them; its reference rounds to it

    def arguments(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors

    def run(self, op: str, impl: str, device: str) -> dict[str, Tensor]:
        tensors = {name: t.clone().to(device) for name, t in self.tensors.items()}
        options = {name: _moved(value, device) for name, value in self.options.items()}
        returned = getattr(hybrid_ops, op)(**self.arguments(tensors), **options, **self.also_return, impl=impl)
        results = iter(_present(returned))
        return {name: tensors[name] if name in tensors else next(results) for name in self.axis}

    def reference(self, op: str, dtype: type) -> dict[str, np.ndarray]:
        """In the arithmetic of `dtype`; float32, the budget's, rounds what a layer keeps between products."""
        arrays = {n: t.numpy() if t.dtype == torch.int32 else to_numpy(t, dtype) for n, t in self.tensors.items()}
        module = importlib.import_module(f"hybrid_ops.reference.{self.module}")
        rounded = {}
        if self.store is not None and dtype == np.float32:
            rounded["store"] = lambda result: round_to(result, self.store).astype(dtype)
        returned = getattr(module, op)(**self.arguments(arrays), **self.options, **rounded, dtype=dtype)
        return dict(zip(self.axis, _present(returned), strict=False))  # more may be returned than was asked for

    def measure(self, op: str, got: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Measure]:
        ref, base = expected(op, dtype)
        for name, value in got.items():
            yield measure(name, value, ref[name], base[name], dtype, axis=self.axis[name])


@dataclass
class ReplayProblem(Problem):
    """A call with a `ReplayCache`, whose parts are among the tensors: they are updated in place."""

    def arguments(self, tensors: dict[str, Any]) -> dict[str, Any]:
        x, B, dt, ring = (tensors[name] for name in REPLAY_CACHE)
        others = {name: t for name, t in tensors.items() if name not in REPLAY_CACHE}
        return others | dict(cache=hybrid_ops.ReplayCache(x, B, dt, ring, capacity=5))


REPLAY_CACHE = ("cache_x", "cache_B", "cache_dt", "ring")


def _moved(value: Any, device: str) -> Any:
    """An option on the device, where it is a tensor, or a named tuple of them: a routing, a quantised matrix."""
    if hasattr(value, "_make"):
        return value._make(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


@dataclass
class ProductProblem(Problem):
    """A product of quantised matrices, each as the op takes it and as the reference does.

    Float32 results are sums of float16 or FP8 products on tensor cores: their budget is that of float16.
    """

    matrices: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    out_dtype: torch.dtype = torch.float32

    def run(self, op: str, impl: str, device: str) -> dict[str, Tensor]:
        matrices = {name: mine for name, (mine, _) in self.matrices.items()}
        options = self.options | matrices | dict(out_dtype=self.out_dtype)
        return Problem(self.module, self.tensors, self.axis, options).run(op, impl, device)

    def reference(self, op: str, dtype: type) -> dict[str, np.ndarray]:
        options = self.options | {name: theirs for name, (_, theirs) in self.matrices.items()}
        return Problem(self.module, self.tensors, self.axis, options).reference(op, dtype)

    def measure(self, op: str, got: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Measure]:
        ref, base = expected(op, dtype)
        budget = torch.float16 if dtype == torch.float32 else dtype
        for name, value in got.items():
            yield measure(name, value, ref[name], base[name], budget, axis=self.axis[name])


def _present(returned: Any) -> list[Any]:
    """The results of a call that are not None, in order."""
    return [result for result in (returned if isinstance(returned, tuple) else (returned,)) if result is not None]


@dataclass
class ByteProblem:
    """A call whose bytes are specified: its results are equal to the reference's, or wrong."""

    argument: Tensor | tuple[Any, ...]  # what is quantised, or is so already
    options: dict[str, Any]
    expected: tuple[np.ndarray, ...]

    def run(self, op: str, impl: str, device: str) -> dict[str, Tensor]:
        returned = getattr(hybrid_ops, op)(_moved(self.argument, device), **self.options, impl=impl)
        if isinstance(returned, Tensor):
            return {"y": returned}
        return {name: t for name, t in zip(returned._fields, returned, strict=True) if isinstance(t, Tensor)}

    def measure(self, op: str, got: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Measure]:
        for (name, value), array in zip(got.items(), self.expected, strict=True):
            right, mine = np.ascontiguousarray(array), value.cpu().contiguous()
            if mine.nbytes != right.nbytes:
                yield Measure(np.inf, f"{name} has {mine.nbytes} bytes, expected {right.nbytes}")
                continue
            wrong = int((mine.reshape(-1).view(torch.uint8).numpy() != right.reshape(-1).view(np.uint8)).sum())
            yield Measure(np.inf if wrong else 0.0, f"{name}: {wrong} of {mine.nbytes} bytes differ" if wrong else None)


def byte_problems(x: Tensor) -> dict[str, ByteProblem]:
    """The quantisers of x, with the options that have most to get wrong, and the way back."""
    from .reference import quant_fp8, quant_nvfp4

    array = x.float().numpy()
    fp8 = quant_fp8.fp8_quantize(array, "1x128")
    nvfp4_options: dict[str, Any] = dict(four_over_six="mse", scale_layout="128x4")
    nvfp4 = quant_nvfp4.nvfp4_quantize(array, **nvfp4_options)
    fp8_parts, nvfp4_parts = ([torch.from_numpy(np.array(part)) for part in parts] for parts in (fp8, nvfp4))
    e4m3 = torch.float8_e4m3fn
    fp8_tensor = hybrid_ops.Fp8Tensor(fp8_parts[0].view(e4m3), fp8_parts[1], "1x128")
    nvfp4_tensor = hybrid_ops.Nvfp4Tensor(nvfp4_parts[0], nvfp4_parts[1].view(e4m3), nvfp4_parts[2], "128x4")
    back = dict(dtype=torch.float32)
    return {
        "fp8_quantize": ByteProblem(x, dict(scaling="1x128"), fp8),
        "fp8_dequantize": ByteProblem(fp8_tensor, back, (quant_fp8.fp8_dequantize(fp8[0], fp8[1], "1x128"),)),
        "nvfp4_quantize": ByteProblem(x, nvfp4_options, nvfp4),
        "nvfp4_dequantize": ByteProblem(
            nvfp4_tensor, back, (quant_nvfp4.nvfp4_dequantize(*nvfp4, scale_layout="128x4"),)
        ),
    }


def product_problems(a: Tensor, b: Tensor, offs: Tensor, gather: Tensor) -> dict[str, ProductProblem]:
    """Products of a (M, K) with b (E, N, K), quantised: dense with the first expert, grouped with all."""
    from .reference import quant_fp8, quant_nvfp4

    def fp8(x: Tensor, scaling: str) -> tuple[Any, Any]:
        codes, scale = quant_fp8.fp8_quantize(x.float().numpy(), scaling)
        data = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        return hybrid_ops.Fp8Tensor(data, torch.from_numpy(scale), scaling), (codes, scale, scaling, "e4m3")

    def nvfp4(x: Tensor, scale_layout: str) -> tuple[Any, Any]:
        parts = quant_nvfp4.nvfp4_quantize(x.float().numpy(), scale_layout=scale_layout)
        data, scale, tensor_scale = (torch.from_numpy(np.array(part)) for part in parts)
        q = hybrid_ops.Nvfp4Tensor(data, scale.view(torch.float8_e4m3fn), tensor_scale, scale_layout)
        return q, (*parts, scale_layout)

    def dense(module: str, mine: tuple[Any, Any], other: tuple[Any, Any]) -> ProductProblem:
        matrices, tensors = dict(a=mine, b=other), dict(bias=b[0, :, 0].float())
        return ProductProblem(module, tensors, dict(y=0), matrices=matrices, out_dtype=a.dtype)

    def grouped(module: str, mine: tuple[Any, Any], other: tuple[Any, Any]) -> ProductProblem:
        matrices, tensors = dict(a=mine, b=other), dict(offs=offs, gather=gather)
        options = dict(activation="relu2")
        return ProductProblem(module, tensors, dict(y=0), options, matrices=matrices, out_dtype=a.dtype)

    return {
        "fp8_gemm": dense("gemm_fp8", fp8(a, "1x128"), fp8(b[0], "128x128")),
        "fp8_grouped_gemm": grouped("gemm_fp8", fp8(a, "row"), fp8(b, "tensor")),
        "nvfp4_gemm": dense("gemm_nvfp4", (a, to_numpy(a)), nvfp4(b[0], "linear")),
        "nvfp4_grouped_gemm": grouped("gemm_nvfp4", fp8(a, "mx"), nvfp4(b, "128x4")),
    }


def mixer_problem(dtype: torch.dtype) -> Problem:
    """A decoding step of a mixer of two groups, each of two heads."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(of)

    batch, heads, headdim, groups, dstate, nslots = 2, 4, 16, 2, 128, 4
    inner = heads * headdim
    channels = inner + 2 * groups * dstate
    tensors = dict(
        zxbcdt=randn(batch, inner + channels + heads),
        conv_state=randn(nslots, channels, 3),
        state=randn(nslots, heads, headdim, dstate, of=torch.float32),
        conv_weight=randn(channels, 4),
        conv_bias=randn(channels),
        A=-torch.rand(heads, generator=generator) * 4 - 0.1,
        D=randn(heads),
        dt_bias=randn(heads, of=torch.float32),
        norm_weight=randn(inner),
        slots=torch.tensor([3, 0], dtype=torch.int32),
    )
    axis = dict(y=0, conv_state=-2, state=-3)
    return Problem("mamba2_step", tensors, axis, dict(group_size=inner // groups))


def problems(dtype: torch.dtype) -> dict[str, Problem | ByteProblem]:
    """A problem for each public op, the same on every machine."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(of)

    batch, seqlen, heads, headdim, groups, nslots = 2, 70, 4, 16, 2, 4
    channels = heads * headdim
    slots = torch.tensor([3, 0], dtype=torch.int32)  # a kernel that confuses sequence and slot is found out
    conv = dict(weight=randn(channels, 4), bias=randn(channels))
    scan = dict(
        x=randn(batch, seqlen, heads, headdim),
        dt=randn(batch, seqlen, heads),
        A=-torch.rand(heads, generator=generator) * 4 - 0.1,
        B=randn(batch, seqlen, groups, 16).repeat(1, 1, 1, 8),  # dstate 128, which every kernel has
        C=randn(batch, seqlen, groups, 16).repeat(1, 1, 1, 8),
        D=randn(heads),
        z=randn(batch, seqlen, heads, headdim),
        dt_bias=randn(heads, of=torch.float32),
    )
    tokens = {name: t[:, 0] if t.dim() > 2 else t for name, t in scan.items()}
    states = randn(nslots, heads, headdim, 16, of=torch.float32).repeat(1, 1, 1, 8)
    cached = dict(
        cache_x=randn(nslots, heads, 8, headdim),
        cache_B=randn(nslots, groups, 8, 128),
        cache_dt=torch.rand(nslots, heads, 8, generator=generator),
        ring=torch.tensor([2, 0, 0, 7], dtype=torch.int32) + 256 * torch.tensor([3, 0, 0, 5], dtype=torch.int32),
    )
    drafts = {name: t[:, :3] if t.dim() > 2 else t for name, t in scan.items()}
    rows = dict(counts=0, offs=0, token_index=0, sorted_weights=0, row_index=0)
    choices = torch.rand(7, 12, generator=generator).argsort(1)[:, :3].to(torch.int32)
    ends, sources = torch.tensor([4, 4, 11], dtype=torch.int32), torch.tensor([3, 0, 6, 1] * 3, dtype=torch.int32)
    experts = dict(up_weight=randn(12, 40, 32, scale=0.2), down_weight=randn(12, 32, 40, scale=0.2))
    shared = dict(shared_up_weight=randn(48, 96, scale=0.1), shared_down_weight=randn(96, 48, scale=0.1))
    latent = dict(fc1_weight=randn(32, 96, scale=0.1), fc2_weight=randn(96, 32, scale=0.2))
    gate = dict(gate_weight=randn(12, 96, scale=0.1))

    def row(*rows: int, **options: Any) -> Tensor:
        return torch.cat([randn(*rows, 96, **options)] * 4, dim=-1)  # as wide as every kernel takes

    return {
        "rms_norm": Problem(
            "norm",
            # a float32 residual stream, of large values as in deep layers
            dict(x=row(6), weight=row(), residual=row(6, of=torch.float32, scale=30.0)),
            dict(y=0, h=0),
        ),
        "gated_rms_norm": Problem("norm", dict(x=row(6), z=row(6), weight=row()), dict(y=0), dict(group_size=128)),
        "causal_conv1d": Problem(
            "conv1d",
            dict(x=randn(batch, seqlen, channels), **conv, initial_states=randn(batch, channels, 3)),
            dict(y=-1, final_states=-2),
            dict(activation="silu"),
            dict(return_final_states=True),
        ),
        "causal_conv1d_update": Problem(
            "conv1d_update",
            dict(x=randn(batch, channels), conv_state=randn(nslots, channels, 3), **conv, slots=slots),
            dict(y=-1, conv_state=-2),
            dict(activation="silu"),
        ),
        "ssd_chunk_scan": Problem(
            "ssd",
            dict(**scan, initial_states=states[:batch]),
            dict(y=-2, final_states=-3),
            dict(dt_softplus=True),
            dict(return_final_states=True),
        ),
        "ssd_state_update": Problem(
            "ssd_update",
            dict(state=states, **tokens, read_slots=slots, write_slots=slots),
            dict(y=-2, state=-3),
            dict(dt_softplus=True),
        ),
        "ssd_replay_update": ReplayProblem(
            "ssd_replay",
            # one sequence whose state takes its tokens in, one that appends
            dict(state=states, **cached, **drafts, slots=slots, rollback=torch.tensor([1, 2], dtype=torch.int32)),
            dict(y=-2, state=-3),
            dict(dt_softplus=True),
        ),
        "ssd_replay_materialize": ReplayProblem(
            "ssd_replay", dict(state=states, **cached, A=scan["A"], slots=slots), dict(state=-3)
        ),
        "mamba2_step": mixer_problem(dtype),
        "moe_router": Problem(
            "moe_router",
            dict(x=randn(7, 96, scale=0.1), weight=randn(12, 96), correction_bias=randn(12, of=torch.float32)),
            dict(weights=0, ids=0, logits=0, **rows),
            dict(topk=3, num_groups=4, topk_groups=2, scaling_factor=2.5),
        ),
        "moe_sort": Problem(
            "moe_router",
            dict(ids=choices, weights=randn(7, 3, of=torch.float32)),
            dict(given_weights=0, given_ids=0, **rows),
            dict(num_experts=12, expert_range=(2, 9)),
        ),
        "grouped_gemm": Problem(
            "grouped_gemm",
            dict(
                a=randn(7, 48),
                b=randn(3, 64, 48, scale=0.2),
                offs=ends,
                gather=sources,
                row_scale=torch.rand(12, generator=generator),
            ),
            dict(y=0, preact=0),
            dict(activation="relu2"),
            dict(return_preact=True),
        ),
        "moe_combine": Problem(
            "moe",
            dict(
                y=randn(8, 40),
                row_index=torch.tensor([[3, 0], [7, -1], [2, 5]], dtype=torch.int32),
                weights=torch.rand(3, 2, generator=generator),
                residual=randn(3, 40),
            ),
            dict(out=0),
            dict(scaling_factor=2.5),
        ),
        "latent_down_proj": Problem(
            "moe", dict(x=randn(7, 96), fc1_weight=latent["fc1_weight"], **gate), dict(latent=0, logits=0)
        ),
        "latent_up_proj": Problem(
            "moe", dict(r=randn(7, 32), fc2_weight=latent["fc2_weight"], residual=randn(7, 96)), dict(out=0)
        ),
        "moe_mlp": Problem(
            "moe",
            dict(x=randn(7, 32), **experts, residual=randn(7, 32)),
            dict(out=0),
            dict(routing=hybrid_ops.moe_sort(choices, torch.rand(7, 3, generator=generator), 12)),
            store=dtype,
        ),
        "latent_moe": Problem(
            "moe",
            dict(x=randn(7, 96), **gate, **experts, **latent, **shared, correction_bias=randn(12, of=torch.float32)),
            dict(out=0),
            dict(topk=3, scaling_factor=2.5),
            store=dtype,
        ),
        **byte_problems(randn(2, 40, 192)),
        **product_problems(randn(7, 144), randn(3, 64, 144, scale=0.2), ends, sources),
    }


@functools.cache  # it is the slowest part, and every implementation is compared with the same
def expected(op: str, dtype: torch.dtype) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The reference's results in float64, and in float32 for the budget."""
    problem = problems(dtype)[op]
    assert isinstance(problem, Problem)
    return problem.reference(op, np.float64), problem.reference(op, np.float32)


def check(op: str, impl: str, device: str, dtypes: Iterable[torch.dtype]) -> Row:
    """Run one implementation of one op in each dtype. An exception is a complaint, not the end of the check."""
    where = "interpreter" if impl == "triton" and device == "cpu" else device
    row = Row(op, impl, where, {}, [])
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        problem = problems(dtype)[op]
        try:
            if impl == "cuda" and hybrid_ops.explain(op, device=device, dtype=dtype).impl != impl:
                continue  # this kernel is not for all dtypes
            got = problem.run(op, impl, device)
        except Exception as error:
            row.complaints.append(f"{name}: {type(error).__name__}: {error}")
            continue
        row.ratio[name] = 0.0
        for ratio, complaint in problem.measure(op, got, dtype):
            row.ratio[name] = max(row.ratio[name], ratio)
            if complaint is not None:
                row.complaints.append(f"{name}: {complaint}")
    return row


def rows(device: str | None = None, ops: Sequence[str] | None = None) -> Iterator[Row]:
    """Every implementation of every op (or of those named) that runs on this machine, one after the other."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = tuple(ops or problems(torch.float32))
    for impl in IMPLS if device == "cuda" else ("torch",):
        for op in names:
            try:
                hybrid_ops.explain(op, device=device, impl=impl)
            except RuntimeError as reason:
                if _device.NO_CUDA_KERNEL not in str(reason):
                    yield Row(op, impl, device, {}, [], skipped=str(reason))
                continue
            yield check(op, impl, device, DTYPES)
    if device == "cpu":
        yield from _interpreter_rows(names)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By implementation, then as `problems` lists the operators."""
    ops = [*problems(torch.float32), "every op"]
    return sorted(rows, key=lambda row: (IMPLS.index(row.impl), ops.index(row.op)))


def _interpreter_rows(names: tuple[str, ...]) -> Iterator[Row]:
    if (reason := interpreter_missing()) is not None:
        yield Row("every op", "triton", "interpreter", {}, [], skipped=reason)
        return
    yield from _rows_of_process(names, "interpreter", {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


def in_background(device: str, processes: int = 4) -> Iterator[Row]:
    """`rows(device)`, worked out by processes of their own that are started now: on a GPU most of it is compiling."""
    ops = tuple(problems(torch.float32))
    shares = (ops[first::processes] for first in range(processes))
    return chain(*[_rows_of_process((f"--device={device}", *share), device, {}) for share in shares])


def _rows_of_process(arguments: Sequence[str], where: str, environment: dict[str, str]) -> Iterator[Row]:
    """The rows that `python -m hybrid_ops.selfcheck` prints, and one more if it did not come to its end."""
    command = [sys.executable, "-m", "hybrid_ops.selfcheck", *arguments]
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by who reads the rows
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=errors, text=True)

    def read() -> Iterator[Row]:
        with errors, process:
            assert process.stdout is not None
            for line in process.stdout:
                yield Row(**json.loads(line))
            if process.wait() == 0:
                return
            errors.seek(0)
            error = errors.read().strip()
            last = error.splitlines()[-1] if error else f"exit status {process.returncode}"
            yield Row("every op", "triton", where, {}, [f"{' '.join(command[1:3])} ended early: {last}"])

    return read()


def interpreter_missing() -> str | None:
    """Why Triton's interpreter cannot run here, and what to install; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of Triton 3.6 fails with numpy >= 2.4: pip install 'triton>=3.7' or 'numpy<2.4'"
    return None


def show(console: Console, rows: Iterable[Row]) -> None:
    """A line for each op and implementation; then what was wrong, and why others did not run."""
    rows = list(rows)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    table = Table(
        title="error / budget, against NumPy in float64; quantisers: 0, every byte is equal",
        title_justify="left",
        header_style="bold",
        box=None,
        pad_edge=False,  # or it would not fit into 80 columns
    )
    for column in ("op", "implementation", *dtypes, ""):
        table.add_column(column, justify="right" if column in dtypes else "left", no_wrap=True)
    for row in rows:
        where = "" if row.where in ("cpu", "cuda") else f" [dim]({row.where})[/]"
        ratios = [f"{row.ratio[dtype]:.2f}" if dtype in row.ratio else "" for dtype in dtypes]
        verdict = "[green]right[/]" if row.passed else "[red]wrong[/]"
        table.add_row(row.op, row.impl + where, *ratios, verdict if row.skipped is None else "[yellow]skipped[/]")
    console.print(table)
    for row in rows:
        for complaint in row.complaints:
            console.print(f"[red]wrong[/] {row.op} ({row.impl}): {escape(complaint)}", highlight=False, soft_wrap=True)
    for reason, skipped in _by_reason(rows).items():
        console.print(f"[yellow]skipped[/] {', '.join(skipped)}: {escape(reason)}", highlight=False, soft_wrap=True)


def _by_reason(rows: Iterable[Row]) -> dict[str, list[str]]:
    """What did not run, for each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.skipped is not None:
            reasons.setdefault(row.skipped, []).append(f"{row.op} ({row.impl})")
    return reasons


def _main(arguments: Sequence[str]) -> None:
    """The rows of the ops named, as lines of JSON: in Triton's interpreter, or with --device=.. all of a device."""
    device, *ops = arguments
    if device.startswith("--device="):
        found = rows(device.removeprefix("--device="), ops)
    else:
        found = (check(op, "triton", "cpu", INTERPRETER_DTYPES) for op in arguments)
    for row in found:
        print(json.dumps(dataclasses.asdict(row)), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
