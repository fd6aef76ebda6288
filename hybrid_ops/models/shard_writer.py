"""`ShardWriter`: sharded safetensors written piece by piece, so that no shard is ever in memory."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .shards import _INDEX, _SINGLE

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}
_SIZES = {name: dtype.itemsize for dtype, name in _NAMES.items()}


class Spec(NamedTuple):
    """A tensor before it is there: its dtype as safetensors calls it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        return _SIZES[self.dtype] * math.prod(self.shape)


class ShardWriter:
    """Writes groups of tensors whose sizes are known beforehand, in the order in which they were announced.

    A group (a weight and its scales) is never torn apart. The index is written by `finish`: without it, and without
    `config.json`, nobody takes the shards for a checkpoint. `discard` removes what was written.
    """

    def __init__(self, folder: str, groups: Sequence[Mapping[str, Spec]], max_shard_bytes: int) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
        self.folder = folder
        self._shards: list[dict[str, Spec]] = [{}]
        self._shard_of: dict[str, int] = {}
        filled = self.total_size = 0
        for group in groups:
            nbytes = sum(spec.nbytes for spec in group.values())
            if self._shards[-1] and filled + nbytes > max_shard_bytes:
                self._shards.append({})
                filled = 0
            self._shards[-1].update(group)
            self._shard_of.update(dict.fromkeys(group, len(self._shards) - 1))
            filled += nbytes
            self.total_size += nbytes
        count = len(self._shards)
        self.files = (
            [_SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self._file: BinaryIO | None = None
        self._open = -1
        self._offsets: dict[str, int] = {}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """One group, to its places in its file."""
        for name, tensor in tensors.items():
            shard = self._shard_of[name]
            if shard != self._open:
                self._begin(shard)
            assert self._file is not None
            assert tuple(tensor.shape) == self._shards[shard][name].shape
            self._file.seek(self._offsets[name])
            # NumPy lends the bytes; it has no bfloat16
            self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _begin(self, shard: int) -> None:
        self._close()
        specs = self._shards[shard]
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        # wide elements first: readers map the file, and a float32 must lie on a multiple of 4
        for name in sorted(specs, key=lambda name: -_SIZES[specs[name].dtype]):
            places[name], start, end = end, end, end + specs[name].nbytes
            header[name] = {"dtype": specs[name].dtype, "shape": specs[name].shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {name: 8 + len(text) + place for name, place in places.items()}
        self._file = open(os.path.join(self.folder, self.files[shard]), "wb")  # noqa: SIM115
        self._open = shard
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(8 + len(text) + end)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def finish(self) -> None:
        """Close the last file; with several, write the index."""
        self._close()
        if len(self.files) == 1:
            return
        weight_map = {name: self.files[shard] for name, shard in self._shard_of.items()}
        with open(os.path.join(self.folder, _INDEX), "w", encoding="utf-8") as file:
            json.dump({"metadata": {"total_size": self.total_size}, "weight_map": weight_map}, file, indent=2)

    def discard(self) -> None:
        """Remove what was written so far."""
        self._close()
        for file in (*self.files, _INDEX):
            if os.path.exists(path := os.path.join(self.folder, file)):
                os.remove(path)
