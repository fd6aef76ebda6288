"""The machine that figures come from, and its ceilings, measured in the same run."""

import datetime
import importlib.util
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .timing import Graph


def describe(device: torch.device) -> dict[str, Any]:
    triton = None
    if importlib.util.find_spec("triton") is not None:
        import triton as module

        triton = module.__version__
    facts: dict[str, Any] = {"gpu": None, "driver": None, "torch": torch.__version__, "triton": triton}
    facts |= {"cuda": torch.version.cuda, "clocks": None}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["driver"] = _nvidia_smi(device, "driver_version").get("driver_version")
    return facts


def clocks(device: torch.device) -> dict[str, str] | None:
    """What the GPU runs at now, and how hot it is, with units; None where nvidia-smi does not say."""
    names = {"sm": "clocks.sm", "sm_max": "clocks.max.sm", "memory": "clocks.mem", "celsius": "temperature.gpu"}
    answer = _nvidia_smi(device, *names.values())
    return {name: answer[field] for name, field in names.items()} if answer else None


def sm_mhz(device: torch.device) -> int | None:
    """The SM clock of now; None where nvidia-smi does not say."""
    number = _nvidia_smi(device, "clocks.sm").get("clocks.sm", "").removesuffix(" MHz")
    return int(number) if number.isdigit() else None


def _nvidia_smi(device: torch.device, *fields: str) -> dict[str, str]:
    """Its answers; nothing where it is missing or knows no such GPU. By UUID, for torch may number only some GPUs."""
    smi = shutil.which("nvidia-smi")
    if smi is None or device.type != "cuda":
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [smi, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", uuid]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    parts = [part.strip() for part in answer.stdout.split(",")]
    return dict(zip(fields, parts, strict=True)) if answer.returncode == 0 and len(parts) == len(fields) else {}


def ceilings(device: torch.device) -> dict[str, float | None]:
    """Copy bandwidth in TB/s (bytes read and written) of 2 GiB, and matrix rates in TFLOP/s of 8192^3, random data."""
    if device.type != "cuda":
        return {"copy_tbs": None, "bf16_tflops": None, "fp8_tflops": None}
    copy_us = _copy_us(device, 2**30)
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    bf16_us = Graph([lambda: torch.mm(a, b.t(), out=out)], keep_results=False).time().median
    fp8_us = math.inf
    if torch.cuda.get_device_capability(device) >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones(n, 1, device=device)

        def scaled_mm() -> torch.Tensor:
            return torch._scaled_mm(a8, b8, one, one.t(), out_dtype=torch.bfloat16, use_fast_accum=True)

        fp8_us = Graph([scaled_mm], keep_results=False).time().median
    flops = 2 * n**3
    return {
        "copy_tbs": 2 * 2**30 / copy_us / 1e6,
        "bf16_tflops": flops / bf16_us / 1e6,
        "fp8_tflops": flops / fp8_us / 1e6 if math.isfinite(fp8_us) else None,
    }


def _copy_us(device: torch.device, size: int) -> float:
    """By an elementwise kernel: as a node of a graph a memcpy of 1 GiB reached 2.8 TB/s on an H200, this one 4.2."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return Graph([lambda: torch.mul(source, 1.0, out=target)], keep_results=False).time().median


def commit() -> str | None:
    """Of the checkout that this file is in, with "-dirty" where files differ from it; None outside one."""
    git = shutil.which("git")
    here = Path(__file__).resolve().parent
    if git is None:
        return None
    command = [git, "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
