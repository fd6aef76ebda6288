"""`patch`, `unpatch` and `patched`: other forwards for the modules of a model, and their own again.

A patched module has an attribute `forward` of its own, before that of its class; without it the module is as it was.
Neither classes nor weights, configurations or global registries change: other models do not notice.
"""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import nn

from ... import explain
from .families import FAMILIES, FORWARDS, Replacement, entry
from .report import Report

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (5, 17)


def patch(model: nn.Module) -> Report:
    """Run a model of `transformers` on the operators of this library.

    Mamba-2 mixers, their gated norms, RMSNorms, MoE routers and experts get another forward over the same weights;
    training, `generate` and the model's caches go on working. To patch again changes nothing.

    Args:
        model: of the families NemotronH, Mamba2, Bamba, Zamba2, FalconH1 or GraniteMoeHybrid (transformers >= 5.17), or
            one that contains modules of these; float32, bfloat16 or float16, on the CPU or on one CUDA device. Packed
            sequences (`seq_idx`, or `cu_seqlens` with batch 1) are kept apart.

    Returns:
        What was replaced, what was left, and why; readable when printed.

    Raises:
        ValueError, TypeError, RuntimeError: the model, its dtype or device, or this machine is not one that works; the
            model is as it was.

    >>> from hybrid_ops.integrations.transformers import patch  # doctest: +SKIP
    >>> print(patch(NemotronHForCausalLM.from_pretrained(folder)))  # doctest: +SKIP
    """
    report, plan = _plan(model)
    _apply(plan)
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: the model computes the same bits as before. A model that is not patched stays as it is."""
    _check_module(model)
    for module in model.modules():
        _restore(module)


@contextmanager
def patched(model: nn.Module) -> Iterator[Report]:
    """`patch` within a block; behind it, whatever happened inside, what was not patched before is not patched again.

    >>> with patched(model) as report:  # doctest: +SKIP
    ...     model.generate(ids)
    """
    report, plan = _plan(model)
    _apply(plan)
    try:
        yield report
    finally:
        for module, _ in plan:
            _restore(module)


Plan = list[tuple[nn.Module, Replacement]]


def _plan(model: nn.Module) -> tuple[Report, Plan]:
    """The report, and what has yet to be replaced. Nothing is changed."""
    _check_module(model)
    report, plan, chosen = Report(type(model).__name__), [], {}
    for name, module in model.named_modules():
        found = entry(module)
        if found is None:
            continue
        reason = found if isinstance(found, str) else _reason_to_leave(module, found)
        if reason is not None:
            report.left.setdefault(f"{type(module).__name__} ({reason})", []).append(name)
            continue
        assert isinstance(found, Replacement)
        report.replaced.setdefault(f"{found.kind} ({type(module).__name__})", []).append(name)
        chosen[name] = module
        if not _is_patched(module):
            plan.append((module, found))
    if not chosen:
        raise ValueError(
            f"model must be of one of the families {', '.join(FAMILIES)}, as they are in transformers itself; got "
            f"{type(model).__module__}.{type(model).__name__}, which stays as it is"
        )
    _check_surroundings(model)
    for name, module in chosen.items():
        _check_tensors(name, module)
    return report, plan


def _reason_to_leave(module: nn.Module, replacement: Replacement) -> str | None:
    if "forward" in vars(module) and not _is_patched(module):
        return "something else has replaced its forward"
    return replacement.unfit(module)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check_surroundings(model: nn.Module) -> None:
    version = importlib.metadata.version("transformers")
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST:
        raise RuntimeError(f"transformers must be {'.'.join(map(str, OLDEST))} or newer, got {version}")
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            raise ValueError("model must not be spread over devices or offloaded by accelerate, got one with its hooks")
        if (getattr(module, "tp_size", None) or 1) > 1:
            raise ValueError(f"model must not be sharded over devices, got tp_size={module.tp_size}")


def _check_tensors(name: str, module: nn.Module) -> None:
    """Of those that go into operators; a quantised projection is none of them."""
    readers = [(name, module)]
    if isinstance(conv := getattr(module, "conv1d", None), nn.Module):
        readers.append((f"{name}.conv1d", conv))
    for owner, reader in readers:
        for key, value in (*reader.named_parameters(recurse=False), *reader.named_buffers(recurse=False)):
            if value.dtype not in DTYPES:
                expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                raise TypeError(
                    f"model must have one of the dtypes {expected}, got {owner}.{key} in {value.dtype}; "
                    "the model stays as it is"
                )
            if value.device.type not in ("cpu", "cuda"):
                raise ValueError(
                    f"model must be on the CPU or a CUDA device, got {owner}.{key} on {value.device}; "
                    "the model stays as it is"
                )
            explain("ssd_chunk_scan", device=str(value.device))  # raises where the kernels cannot run, and says why


def _is_patched(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, MethodType) and forward.__func__ in FORWARDS


def _apply(plan: Plan) -> None:
    for module, replacement in plan:
        module.forward = MethodType(replacement.forward, module)  # type: ignore[method-assign]


def _restore(module: nn.Module) -> None:
    if _is_patched(module):
        del module.forward
