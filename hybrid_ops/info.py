"""`hybrid-ops info`: what this machine has, what is missing and how to get it, and what implements each op."""

import importlib.metadata
import importlib.util
import os
import platform
import re
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import hybrid_ops

from . import _device


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]
    sms: int
    memory: int  # bytes
    driver: str

    def __str__(self) -> str:
        major, minor = self.capability
        memory = f"{self.memory / 2**30:.0f} GiB"
        return f"{self.name}, sm_{major}{minor}, {self.sms} SMs, {memory}, driver for CUDA {self.driver}"


class NoGpu(Exception):
    """Why no GPU can be described."""


def gpus() -> list[Gpu]:
    """The GPUs as the driver tells cuda-python, so that a CPU build of torch does not hide them."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return _torch_gpus()

    def ask(function: str, *arguments: object) -> object:
        try:
            error, *values = getattr(driver, function)(*arguments)
        except RuntimeError as missing:  # cuda-python found no libcuda
            raise NoGpu("no NVIDIA driver") from missing
        if int(error) != 0:
            raise NoGpu(f"{function}: {error.name}")
        return values[0] if values else None

    ask("cuInit", 0)
    version = ask("cuDriverGetVersion")
    attribute = driver.CUdevice_attribute
    found = []
    for ordinal in range(ask("cuDeviceGetCount")):  # type: ignore[call-overload]
        device = ask("cuDeviceGet", ordinal)
        major, minor, sms = (
            ask("cuDeviceGetAttribute", getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device)
            for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")
        )
        name = ask("cuDeviceGetName", 256, device).rstrip(b"\0").decode()  # type: ignore[attr-defined]
        memory = ask("cuDeviceTotalMem", device)
        found.append(Gpu(name, (major, minor), sms, memory, f"{version // 1000}.{version % 1000 // 10}"))  # type: ignore[operator, arg-type]
    return found


def _torch_gpus() -> list[Gpu]:
    if not torch.cuda.is_available():
        raise NoGpu("torch sees none; pip install cuda-python to ask the driver itself")
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cuda = torch.version.cuda or "unknown"
    return [
        Gpu(p.name, (p.major, p.minor), p.multi_processor_count, p.total_memory, f"at least {cuda}") for p in properties
    ]


def missing_extras() -> dict[str, list[str]]:
    """The packages that each extra of hybrid-ops would install and this environment lacks, where there are any."""
    try:
        required = importlib.metadata.requires("hybrid-ops") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, never installed
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in required:
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", requirement)
        package = re.match(r"[\w.-]+", requirement)
        if extra is not None and package is not None and not _installed(package[0]):
            missing.setdefault(extra[1], []).append(package[0])
    return missing


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def describe() -> dict[str, str]:
    """The machine and the software, a line each."""
    facts = {
        "machine": _machine(),
        "Python": platform.python_version(),
        "hybrid-ops": hybrid_ops.__version__,
        "torch": f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"),
        "Triton": _triton(),
    }
    try:
        found = gpus()
        facts |= {"GPU" if i == 0 else f"GPU {i}": str(gpu) for i, gpu in enumerate(found)} or {"GPU": "none"}
        if found and not torch.cuda.is_available():
            facts["GPU"] += "; not used, for torch does not see it: install a CUDA build of torch"
    except NoGpu as reason:
        facts["GPU"] = f"none ({reason}): everything runs on the CPU"
    extension = _device.cuda_extension()
    facts["CUDA extension"] = _device.extension_missing() or f"built: {getattr(extension, '__file__', '')}"
    if missing := missing_extras():
        facts["missing extras"] = "\n".join(
            f"{', '.join(packages)}: pip install 'hybrid-ops[{extra}]'" for extra, packages in missing.items()
        )
    return facts


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed: pip install triton"
    version = importlib.metadata.version("triton")
    if torch.cuda.is_available() and (problem := _device.triton_missing()) is not None:
        return f"{version}; {problem}"
    return version


def processor() -> str:
    """The CPU and how many of its cores this process may use."""
    return f"{_cpu()}, {len(os.sched_getaffinity(0))} cores"


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor()}, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            if (model := re.search(r"model name\s*:\s*(.*)", cpuinfo.read())) is not None:
                return model[1].strip()
    except OSError:
        pass
    return platform.machine()


def ops_table(device: str) -> Table:
    """For each public op the implementation that impl="auto" picks on `device`, its configuration, and the reason."""
    table = Table(title=f"what impl='auto' runs on {device}", title_justify="left", box=None, header_style="bold")
    for column in ("op", "implementation", "configuration", "reason"):
        table.add_column(column, overflow="fold")
    for op in hybrid_ops.ops():
        try:
            chosen, config, reason = hybrid_ops.explain(op, device=device)
        except RuntimeError as problem:
            table.add_row(op, "[red]none[/]", "", Text(str(problem)))
            continue
        table.add_row(op, chosen, ", ".join(f"{k}={v}" for k, v in config.items()), Text(reason))
    return table


def show(console: Console) -> None:
    """Print everything."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in describe().items():
        facts.add_row(name, Text(value))  # not markup: "hybrid-ops[nvcc]"
    console.print(facts)
    console.print()
    console.print(ops_table("cuda" if torch.cuda.is_available() else "cpu"))
