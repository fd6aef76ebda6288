"""`Quantizer`: reads the matrices of a checkpoint one by one and turns them into the tensors that are written."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..quant_fp8 import Fp8Tensor, fp8_dequantize, fp8_quantize
from ..quant_nvfp4 import BLOCK, Nvfp4Tensor, nvfp4_dequantize, nvfp4_quantize
from .quantize_report import Errors
from .quantize_rules import KEEP, fused_with
from .shard_writer import Spec
from .shards import CheckpointError, _Entry


class Source(NamedTuple):
    """A tensor of the new checkpoint before it is quantised, and where it is read: the whole or one expert's part."""

    name: str
    entry: _Entry
    expert: int | None
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes if self.expert is None else self.entry.nbytes // self.entry.shape[0]


class Quantizer:
    """One source at a time is in memory; `announce` says beforehand what `convert` returns."""

    def __init__(
        self,
        sources: Sequence[Source],
        chosen: Mapping[str, str],
        *,
        device: torch.device | str,
        four_over_six: str | None,
        input_scale: float | None,
    ) -> None:
        self.chosen = chosen
        self.device = torch.device(device)
        self.four_over_six = four_over_six
        self.input_scale = input_scale
        self._reader = _Reader()
        self._together: dict[str, list[Source]] = {}
        for source in sources:
            product = fused_with(source.module)
            if product is not None and product.endswith(".qkv") and self.format(source) == "nvfp4":
                self._together.setdefault(product, []).append(source)

    def format(self, source: Source) -> str:
        return self.chosen.get(source.module, KEEP)

    def announce(self, source: Source) -> dict[str, Spec]:
        """The names, dtypes and shapes of what is written for a source."""
        format = self.format(source)
        if format == KEEP:
            return {source.name: Spec(source.entry.dtype, source.shape)}
        N, K = source.shape
        if format == "nvfp4":
            parts = {
                "weight": Spec("U8", (N, K // 2)),
                "weight_scale": Spec("F8_E4M3", (N, K // BLOCK)),
                "weight_scale_2": Spec("F32", ()),
            }
        else:
            parts = {"weight": Spec("F8_E4M3", (N, K)), "weight_scale": Spec("F32", ())}
            if self.input_scale is not None:
                parts["input_scale"] = Spec("F32", ())
        return {f"{source.module}.{part}": spec for part, spec in parts.items()}

    def convert(self, source: Source, errors: Errors) -> dict[str, Tensor]:
        """Read, quantise, and measure the error."""
        format = self.format(source)
        if format == KEEP:
            return {source.name: self._reader.read(source)}
        weight = self._weight(source)
        parts, restored = self._nvfp4(weight, source) if format == "nvfp4" else self._fp8(weight)
        after = sum(part.nbytes for part in parts.values())
        errors.add(source.module, format, source.nbytes, after, weight, restored)
        return {f"{source.module}.{part}": tensor for part, tensor in parts.items()}

    def _weight(self, source: Source) -> Tensor:
        weight = self._reader.read(source).to(self.device)
        if weight.dtype == torch.float64:
            weight = weight.float()
        wrong = int((~weight.isfinite()).sum())
        if wrong:
            raise CheckpointError(
                f"{source.entry.path}: {source.entry.stored_name} must be finite to be quantised, "
                f"got {wrong} values that are not"
            )
        return weight

    def _nvfp4(self, weight: Tensor, source: Source) -> tuple[dict[str, Tensor], Tensor]:
        scale = self._tensor_scale(source)
        q = nvfp4_quantize(weight, mode="modelopt", four_over_six=self.four_over_six, tensor_scale=scale)
        assert isinstance(q, Nvfp4Tensor)
        parts = {"weight": q.data, "weight_scale": q.scale, "weight_scale_2": q.tensor_scale}
        return parts, nvfp4_dequantize(q, dtype=torch.float32)

    def _fp8(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        q = fp8_quantize(weight, "tensor")
        assert isinstance(q, Fp8Tensor)
        parts = {"weight": q.data, "weight_scale": q.scale}
        if self.input_scale is not None:
            parts["input_scale"] = torch.tensor(self.input_scale)
        return parts, fp8_dequantize(q, dtype=torch.float32)

    def _tensor_scale(self, source: Source) -> Tensor | None:
        """One for q, k and v, for readers that fuse them use one for all three; None: the matrix's own."""
        together = self._together.get(fused_with(source.module) or "")
        if together is None:
            return None
        amax = torch.stack([self._weight(each).abs().amax().float() for each in together]).amax()
        largest = torch.full_like(amax, 2688.0 if self.four_over_six is None else 1536.0)
        scale = torch.div(amax, largest)
        return scale.where(scale > 0, 1.0)


class _Reader:
    """Reads tensors, or one expert's part of them; one file is open at a time."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._file: Any = None

    def read(self, source: Source) -> Tensor:
        entry = source.entry
        try:
            if entry.path != self._path:
                self._file, self._path = safe_open(entry.path, framework="pt"), entry.path
            if source.expert is None:
                return self._file.get_tensor(entry.stored_name)
            return self._file.get_slice(entry.stored_name)[source.expert]
        except SafetensorError as error:
            raise CheckpointError(f"{entry.path}: {entry.stored_name} cannot be read: {error}") from error
