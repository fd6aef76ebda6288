"""The CUDA sources: every header through NVRTC, which needs neither nvcc nor a GPU; the extension where nvcc is."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hybrid_ops

from . import sass

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source checkout")
    spec = importlib.util.spec_from_file_location("hybrid_ops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- device code, through NVRTC

KERNELS = {  # of each header: every dtype and form at least once; nvcc compiles all of them
    "conv1d_sm90.cuh": [
        "hybrid_ops::conv1d_kernel<__nv_bfloat16, 4, true, false, 8>",
        "hybrid_ops::conv1d_kernel<__nv_bfloat16, 4, true, true, 8>",
        "hybrid_ops::conv1d_kernel<__half, 4, false, true, 8>",
        "hybrid_ops::conv1d_kernel<__half, 3, true, true, 4>",
        "hybrid_ops::conv1d_kernel<float, 2, false, false, 4>",
        "hybrid_ops::conv1d_final_states_kernel<__nv_bfloat16>",
    ],
    "conv1d_update_sm90.cuh": [
        "hybrid_ops::conv1d_update_kernel<__nv_bfloat16, 4, true, true>",
        "hybrid_ops::conv1d_update_kernel<__half, 3, false, false>",
        "hybrid_ops::conv1d_update_kernel<float, 2, true, false>",
        "hybrid_ops::conv1d_update_kernel<float, 4, false, true>",
    ],
    "ssd_sm90.cuh": [
        "hybrid_ops::ssd_kernel<hybrid_ops::SsdConfig<64, 1, true, hybrid_ops::Sharing::none>>",
        "hybrid_ops::ssd_kernel<hybrid_ops::SsdConfig<80, 1, false, hybrid_ops::Sharing::turns>>",
        "hybrid_ops::ssd_kernel<hybrid_ops::SsdConfig<128, 1, true, hybrid_ops::Sharing::segments>>",
        "hybrid_ops::ssd_kernel<hybrid_ops::SsdConfig<64, 2, true, hybrid_ops::Sharing::none>>",
        "hybrid_ops::ssd_kernel<hybrid_ops::SsdConfig<64, 1, true, hybrid_ops::Sharing::segments, true>>",
        "hybrid_ops::ssd_kernel<hybrid_ops::SsdConfig<80, 1, true, hybrid_ops::Sharing::none, true>>",
    ],
    "ssd_pair_sm90.cuh": [
        "hybrid_ops::ssd_pair_kernel<hybrid_ops::PairConfig<false>>",
        "hybrid_ops::ssd_pair_kernel<hybrid_ops::PairConfig<true>>",
    ],
    "ssd_update_sm90.cuh": [
        "hybrid_ops::ssd_update_one_kernel<float, 128, 2, 4, false>",
        "hybrid_ops::ssd_update_one_kernel<__half, 256, 5, 16, true>",
        "hybrid_ops::ssd_update_kernel<__nv_bfloat16, 64, 4, true>",
        "hybrid_ops::ssd_update_kernel<float, 256, 4, false>",
        "hybrid_ops::ssd_update_one_kernel<hybrid_ops::E4m3, 64, 4, 16, false>",
        "hybrid_ops::ssd_update_kernel<hybrid_ops::Int8, 128, 4, false>",
    ],
    "ssd_replay_sm90.cuh": [
        "hybrid_ops::ssd_replay_kernel<float, 128, 16, 2, false>",
        "hybrid_ops::ssd_replay_kernel<float, 256, 4, 4, false>",
        "hybrid_ops::ssd_replay_kernel<__nv_bfloat16, 128, 8, 2, false>",
        "hybrid_ops::ssd_replay_kernel<__nv_bfloat16, 256, 8, 2, true>",
        "hybrid_ops::ssd_replay_kernel<__half, 64, 4, 4, true>",
    ],
    "ssd_replay_one_sm90.cuh": [
        "hybrid_ops::ssd_replay_one_kernel<__nv_bfloat16, 128, false>",
        "hybrid_ops::ssd_replay_one_kernel<__half, 128, true>",
        "hybrid_ops::ssd_replay_one_kernel<__nv_bfloat16, 64, true>",
        "hybrid_ops::ssd_replay_one_kernel<__half, 256, false>",
    ],
    "mamba2_step_sm90.cuh": [
        "hybrid_ops::mamba2_step_kernel<float, 128, false, true>",
        "hybrid_ops::mamba2_step_kernel<float, 256, false, false>",
        "hybrid_ops::mamba2_step_kernel<__nv_bfloat16, 64, false, true>",
        "hybrid_ops::mamba2_step_kernel<__half, 256, true, true>",
    ],
    "norm_sm90.cuh": [
        "hybrid_ops::norm_kernel<__nv_bfloat16, __nv_bfloat16, hybrid_ops::Gate::first, 3>",
        "hybrid_ops::norm_kernel<__half, __half, hybrid_ops::Gate::last, 3>",
        "hybrid_ops::norm_kernel<__half, float, hybrid_ops::Gate::none, 3>",
        "hybrid_ops::norm_kernel<float, float, hybrid_ops::Gate::none, 3>",
    ],
    "norm_bwd_sm90.cuh": [
        "hybrid_ops::norm_bwd_kernel<__nv_bfloat16, __nv_bfloat16, hybrid_ops::Gate::first, 3>",
        "hybrid_ops::norm_bwd_kernel<__half, float, hybrid_ops::Gate::none, 6>",
        "hybrid_ops::norm_bwd_kernel<float, float, hybrid_ops::Gate::last, 6>",
        "hybrid_ops::norm_dweight_kernel<__nv_bfloat16>",
    ],
    "conv1d_bwd_sm90.cuh": [
        "hybrid_ops::conv1d_bwd_kernel<__nv_bfloat16, 4, true, false>",
        "hybrid_ops::conv1d_bwd_kernel<__half, 4, true, true>",
        "hybrid_ops::conv1d_bwd_kernel<float, 4, false, true>",
        "hybrid_ops::conv1d_bwd_sum_kernel<__nv_bfloat16, 4>",
        "hybrid_ops::conv1d_bwd_states_kernel<__half, 3, true>",
    ],
}
HOST_HEADERS = {"common/tensor_map.cuh", "common/launch.cuh", "common/conv1d_dispatch.cuh", "common/norm_dispatch.cuh"}


def headers():
    return sorted(str(p.relative_to(CSRC)) for p in CSRC.rglob("*.cuh"))


def cuda_include():
    from cuda import pathfinder

    return pathfinder.find_nvidia_header_directory("cudart")


def nvrtc_compile(header, expressions, architecture):
    """The cubin of a program that includes `header` and instantiates `expressions`."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="needs cuda-python: pip install 'hybrid-ops[test]'")
    from cuda.bindings import nvrtc

    try:
        pathfinder.load_nvidia_dynamic_lib("nvrtc")
    except pathfinder.DynamicLibNotFoundError:
        pytest.skip("libnvrtc is missing: pip install nvidia-cuda-nvrtc")
    include = cuda_include()
    if include is None:
        pytest.skip("cuda_bf16.h is missing: pip install nvidia-cuda-runtime")

    def call(function, *arguments):
        status, *values = function(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{function.__name__}: {status.name}")
        return values[0] if values else None

    program = call(nvrtc.nvrtcCreateProgram, f'#include "{header}"\n'.encode(), b"main.cu", 0, [], [])
    for expression in expressions:
        call(nvrtc.nvrtcAddNameExpression, program, expression.encode())
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++20", f"-I{CSRC}", f"-I{include}"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    # buffers that may be written: b" " * 1 is Python's only b" ", and would be another byte for the rest of the process
    log = bytearray(call(nvrtc.nvrtcGetProgramLogSize, program))
    call(nvrtc.nvrtcGetProgramLog, program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    cubin = bytearray(call(nvrtc.nvrtcGetCUBINSize, program))
    call(nvrtc.nvrtcGetCUBIN, program, cubin)
    return cubin


def cuobjdump():
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resource_usage(path):
    """(kernel, registers, bytes of stack, bytes of local memory)"""
    printed = subprocess.run([cuobjdump(), "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", printed)
    return [(name, int(registers), int(stack), int(local)) for name, registers, stack, local in found]


def test_every_header_is_compiled():
    device_headers = {h for h in headers() if not h.startswith("common/")}
    assert device_headers == set(KERNELS), "name the kernels of each .cuh in KERNELS"
    device_code = [(CSRC / h).read_text() for h in set(headers()) - HOST_HEADERS]
    included = {name for text in device_code for name in re.findall(r'#include "(common/.*[.]cuh)"', text)}
    assert {h for h in headers() if h.startswith("common/")} == included | HOST_HEADERS


@pytest.mark.parametrize("header", sorted(KERNELS))
def test_nvrtc(header, setup, tmp_path):
    """To machine code for its architectures; nothing spills, products find their operands, loads their stages."""
    for architecture in setup.architectures(CSRC / header):
        cubin = nvrtc_compile(header, KERNELS[header], architecture)
        path = tmp_path / "kernels.cubin"
        path.write_bytes(cubin)
        usage = resource_usage(path)
        assert len(usage) == len(KERNELS[header])
        assert all(stack == local == 0 for _, _, stack, local in usage), usage
        machine_code = sass.of_cubin(cuobjdump(), path)
        assert ("HGMMA" in machine_code) == header.startswith(("ssd_sm90", "ssd_pair"))
        assert sass.products_disturbed(machine_code) == []
        assert sass.loads_left_behind(machine_code) == []


@pytest.mark.parametrize(
    ("between", "wait", "is_disturbed"),
    [
        ("IMAD.MOV.U32 R9, RZ, RZ, R3", "0x0", True),
        ("@!P0 LDSM.16.M88.4 R6, [R3]", "0x0", True),
        ("FMUL R3, R30, R3", "0x0", True),
        ("STS.128 [R2], R8", "0x0", False),
        ("IMAD.MOV.U32 R12, RZ, RZ, R8", "0x0", False),
        ("IMAD.MOV.U32 R3, RZ, RZ, R3", "0x1", True),
    ],
)
def test_disturbed_products_are_seen(between, wait, is_disturbed):
    """Between a product and the wait for it, or behind a wait that leaves its group under way."""
    lines = ["HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR20], R24, gsb0", between, f"WARPGROUP.DEPBAR.LE gsb0, {wait}"]
    lines.append("IMAD.MOV.U32 R8, RZ, RZ, RZ")
    code = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    assert bool(sass.products_disturbed(code)) == is_disturbed


@pytest.mark.parametrize(
    ("between", "is_left"),
    [
        ("FMUL R3, R30, R3", True),
        ("LDS R8, [R3]", True),
        ("FMUL R3, R9, R3", False),
        ("STS.128 [R2], R8", False),
        ("HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR20], R24, gsb0", False),
    ],
)
def test_loads_left_behind_are_seen(between, is_left):
    """Between a load and an arrival."""
    lines = ["LDSM.16.M88.4 R8, [R3]", between, "@!P4 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR20+0x317a0], RZ"]
    code = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    assert bool(sass.loads_left_behind(code)) == is_left


def test_nvrtc_sees_errors(tmp_path):
    with pytest.raises(AssertionError, match="no_such_kernel"):
        nvrtc_compile("conv1d_sm90.cuh", ["hybrid_ops::no_such_kernel"], "90a")


# --- setup.py


def test_architectures(setup):
    assert setup.architectures(Path("ssd_sm90.cu")) == ["90a"]
    assert setup.architectures(Path("gemm_sm100.cu")) == ["100a"]
    assert setup.architectures(Path("norm.cu")) == ["90", "100"]


@pytest.mark.parametrize(
    ("variable", "nvcc", "gpu", "expected"),
    [
        (None, "/nvcc", True, True),
        (None, "/nvcc", False, False),
        (None, None, True, False),
        ("1", None, False, True),
        ("0", "/nvcc", True, False),
    ],
)
def test_when_the_extension_is_built(setup, monkeypatch, variable, nvcc, gpu, expected):
    monkeypatch.delenv("HYBRID_OPS_CUDA", raising=False)
    if variable is not None:
        monkeypatch.setenv("HYBRID_OPS_CUDA", variable)
    monkeypatch.setattr(setup, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(setup, "gpu_visible", lambda: gpu)
    assert setup.wanted() is expected


def test_nvcc_of_cuda_home_comes_first(setup, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    setup.find_nvcc.cache_clear()
    assert setup.find_nvcc() == str(nvcc)
    setup.find_nvcc.cache_clear()


def test_an_object_is_named_by_what_goes_into_it(setup, monkeypatch, tmp_path):
    """Neither place nor time, but every header that is included, and the flags."""
    here = setup.digest(CSRC / "conv1d_sm90.cu", "flags")
    copy = tmp_path / "elsewhere"
    shutil.copytree(CSRC, copy)
    monkeypatch.setattr(setup, "CSRC", copy)

    def there(*facts):
        return setup.digest(copy / "conv1d_sm90.cu", *facts)

    assert there("flags") == here
    assert there("other flags") != here
    with (copy / "cutlass_layouts.cu").open("a") as unrelated:
        unrelated.write("// changed\n")
    assert there("flags") == here
    with (copy / "common" / "vector.cuh").open("a") as included_by_an_included_one:
        included_by_an_included_one.write("// changed\n")
    assert there("flags") != here


def test_what_is_missing_is_named(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    with pytest.raises(setup.CannotBuild, match="nvcc is missing: pip install 'cuda-toolkit"):
        setup.build(tmp_path / "x.so")
    monkeypatch.setattr(setup, "find_nvcc", lambda: "/nvcc")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(setup.CannotBuild, match="apt-get install g"):
        setup.build(tmp_path / "x.so")
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(setup.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(setup.CannotBuild, match=r"Python.h is missing: apt-get install python3-dev"):
        setup.build(tmp_path / "x.so")
    assert not (tmp_path / "x.so").exists()


def test_a_compiler_error_becomes_one_line(setup):
    script = "print('In file a.cu:'); print('a.cu(3): error: no such thing'); raise SystemExit(2)"
    with pytest.raises(setup.CannotBuild) as failure:
        setup.run([sys.executable, "-c", script], "compiling failed")
    assert str(failure.value) == "compiling failed: a.cu(3): error: no such thing"


# --- the extension


@pytest.fixture(scope="module")
def extension(setup, tmp_path_factory):
    """Path of the extension, built here; objects that have not changed come from build/cuda."""
    if setup.find_nvcc() is None:
        pytest.skip("nvcc is missing: pip install 'cuda-toolkit[nvcc,cccl]'")
    target = tmp_path_factory.mktemp("built") / f"_cuda{setup.sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        setup.build(target)
    except setup.CannotBuild as reason:
        if re.search("(CUTLASS headers are|Python.h is|g[+][+] is) missing", str(reason)):
            pytest.skip(str(reason))
        raise
    return target


def call_extension(extension, expression):
    """Evaluate an expression of `c`, the extension, in a process that sees no GPU."""
    code = f"import sys; sys.path.insert(0, {str(extension.parent)!r}); import _cuda as c; print({expression})"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return result.stdout.strip()


def test_extension_imports_without_a_gpu(extension):
    assert call_extension(extension, "c.Conv1d.__name__") == "Conv1d"


def test_extension_says_what_went_wrong_without_a_gpu(extension):
    arguments = "(0,) * 4, (1, 8, 8, 4, 1, 1, 3), (0, 0), (0, 0), (0,) * 3, (0,) * 3, -1, True, (8, 64)"
    with pytest.raises(subprocess.CalledProcessError) as failure:
        call_extension(extension, f"c.Conv1d({arguments})((None,) * 9, 0, 0)")
    assert re.search(r"RuntimeError: cuda\w+: (CUDA driver|no CUDA)", failure.value.stderr), failure.value.stderr


def test_extension_has_the_architectures_of_the_file_names(extension, setup):
    printed = subprocess.run([cuobjdump(), "--list-elf", extension], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"(\w+)\.(sm_\w+)\.cubin", printed))
    assert found == {(p.stem, f"sm_{a}") for p in CSRC.glob("*.cu") for a in setup.architectures(p)}


def test_no_kernel_of_the_extension_spills(extension):
    usage = resource_usage(extension)
    assert len(usage) > sum(map(len, KERNELS.values()))
    assert all(stack == local == 0 for _, _, stack, local in usage), usage


def test_machine_code_of_the_ssd(extension, tmp_path):
    """What test_nvrtc sees of some forms, of all."""
    subprocess.run([cuobjdump(), "--extract-elf", "ssd_sm90", extension], cwd=tmp_path, check=True)
    (cubin,) = tmp_path.glob("*.cubin")
    machine_code = sass.of_cubin(cuobjdump(), cubin)
    assert machine_code.count("Function :") == 29
    assert sass.products_disturbed(machine_code) == []
    assert sass.loads_left_behind(machine_code) == []


def test_extension_was_built_with_cutlass(extension, setup):
    assert f"nvidia-cutlass=={call_extension(extension, 'c.cutlass_version()')}" == setup.CUTLASS


def test_cutlass_scale_layout(extension):
    """CuTe's layout of NVFP4 scales: tiles of 128 rows and 4 blocks, in which row r is at r % 32 * 16 + r // 32 * 4."""
    rows, columns = 256, 192
    blocks = columns // 16
    printed = call_extension(
        extension, f"[c.scale_offset_128x4(r, b, {rows}, {columns}) for r in range({rows}) for b in range({blocks})]"
    )
    offsets = np.fromstring(printed.strip("[]"), sep=",", dtype=int).reshape(rows, blocks)
    r, b = np.arange(rows)[:, None], np.arange(blocks)
    tile = (r // 128) * (blocks // 4) + b // 4
    np.testing.assert_array_equal(offsets, tile * 512 + (r % 32) * 16 + r % 128 // 32 * 4 + b % 4)


def test_the_launcher_knows_the_extensions_dtypes(extension):
    from hybrid_ops._csrc.ssd_update import STATE_DTYPES as DTYPES  # all of them

    names = [str(dtype).removeprefix("torch.").upper() for dtype in DTYPES]
    expected = call_extension(extension, f"[getattr(c, name) for name in {names}]")
    assert expected == str(list(DTYPES.values()))


def test_config_is_a_pure_function_of_the_problem():
    from hybrid_ops._csrc.conv1d import Config, config

    assert config(10240, 2, alignment=16) == config(6144, 2, alignment=16) == Config(channels=8, columns=64)
    assert config(1280, 2, alignment=16) == Config(channels=8, columns=32)  # 160 vectors
    assert config(10240, 2, alignment=8) == Config(channels=4, columns=64)
    assert config(12, 2, alignment=16) == Config(channels=4, columns=32)
    assert config(10240, 2, alignment=16, parameters_fp32=True) == Config(channels=4, columns=64)
    assert config(10240, 4, alignment=16) == Config(channels=4, columns=64)
    assert config(0, 2, alignment=16) == Config(channels=8, columns=64)
    assert hybrid_ops.explain("causal_conv1d", impl="torch").config == {}


def test_rows_by_their_alignment():
    from hybrid_ops._csrc.conv1d import alignment, refusal

    x, weight = torch.zeros(2, 6, 64, dtype=torch.bfloat16), torch.zeros(16, 4)
    expected = {0: 16, 8: 16, 4: 8, 2: 4, 1: 2}
    slices = {offset: x[..., offset : offset + 16] for offset in expected}
    assert {offset: alignment(s) for offset, s in slices.items()} == expected
    assert alignment(slices[8], slices[4]) == 8
    assert alignment(x[:1, :1, 4:20], x[:, :1]) == 8  # strides of sizes that are 1 do not count
    refused = {offset for offset, s in slices.items() if refusal(s, weight, None, s, None, None) is not None}
    assert refused == {2, 1}
    assert "rows that start at multiples of 8 bytes" in refusal(slices[2], weight, None, x, None, None)


def test_config_of_ssd_update():
    """4 KB of states for a CTA, 64 or 80 rows where there is more to do for each; another form for few sequences."""
    from hybrid_ops._csrc.ssd_update import Config, config

    def of(batch, itemsize, stochastic=False, headdim=64, dstate=128, nheads=128):
        return config(headdim, dstate, batch * nheads, 132, itemsize, stochastic)

    assert of(64, 4) == of(8, 4, nheads=64) == of(64, 4, headdim=128) == Config(warps=2, rows=4)
    assert of(64, 2) == of(4, 2) == of(64, 2, headdim=80) == of(64, 2, headdim=56) == Config(warps=2, rows=8)
    assert of(64, 4, dstate=256) == Config(warps=2, rows=2)
    assert of(64, 2, dstate=64) == Config(warps=2, rows=16)
    assert of(64, 2, True) == of(64, 1) == of(64, 1, dstate=256) == Config(warps=4, rows=16)
    assert of(64, 2, True, 80) == of(64, 1, headdim=80) == Config(warps=5, rows=16)
    assert of(1, 4) == of(1, 2) == of(4, 2, True) == of(0, 2) == of(1, 4, headdim=1) == Config(warps=4, rows=4)
    assert of(64, 2, True, 40) == of(64, 2, headdim=24) == Config(warps=4, rows=4)


def test_config_of_ssd_replay():
    from hybrid_ops._csrc.ssd_replay import Config, config, config_of_one

    def of(batch, itemsize=4, x_itemsize=2, headdim=64, dstate=128, nheads=64, ngroups=8):
        return config(headdim, dstate, itemsize, x_itemsize, nheads, ngroups, batch, 132)

    assert of(1) == of(8) == Config(rows=16, warps=4, heads=1)
    assert of(16) == of(64) == of(64, itemsize=2) == Config(rows=16, warps=4, heads=2)
    assert of(128) == of(256, nheads=128, ngroups=1, headdim=80) == Config(rows=16, warps=4, heads=4)
    assert of(128, nheads=9, ngroups=3) == Config(rows=16, warps=4, heads=1)
    assert of(1, itemsize=2) == Config(rows=16, warps=2, heads=1)
    assert of(16, x_itemsize=4) == Config(rows=8, warps=4, heads=2)
    assert of(16, dstate=256) == Config(rows=4, warps=4, heads=2)
    assert config_of_one(128) == config_of_one(6) == Config(rows=64, warps=2, heads=2)
    assert config_of_one(9) == Config(rows=64, warps=1, heads=1)
