"""Translations of single arguments that several libraries share."""

import torch
from torch import Tensor


def check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")


def must_be_none(why: str, **arguments: object) -> None:
    """For arguments that nothing of ours can honour; `why` names the function to use instead."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} must be None, got {type(value).__name__}: {why}")


def activation_name(activation: str | bool | None) -> str | None:
    """Swish is another name of SiLU; vLLM also takes a bool."""
    if activation is True or activation in ("silu", "swish"):
        return "silu"
    if activation is None or activation is False:
        return None
    raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")


def int32(indices: Tensor | None) -> Tensor | None:
    return None if indices is None else indices.to(torch.int32)
