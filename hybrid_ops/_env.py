"""Every environment variable of the project. Imports nothing, so that setup.py can read it too.

| variable           | read at | meaning                                                                     |
|--------------------|---------|-----------------------------------------------------------------------------|
| `HYBRID_OPS_CUDA`  | build   | `1` builds the CUDA extension although no GPU is visible, `0` never builds   |
| `HYBRID_OPS_CHECK` | call    | `1` checks index values (slots, `cu_seqlens`) on the GPU too; synchronises   |
"""

import os


def build_cuda() -> str | None:
    return os.environ.get("HYBRID_OPS_CUDA")


_VALUES: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]  # os.environ takes 1 us to find nothing


def check_values() -> bool:
    return _VALUES.get(b"HYBRID_OPS_CHECK") == b"1"
