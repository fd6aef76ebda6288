import pytest
import torch
from hypothesis import given, settings

from .ssd_replay_cases import cases, check_stream, for_cuda
from .ssd_update_cases import CPU_DTYPES, INTERPRETER_DTYPES, implementation


@given(case=cases(CPU_DTYPES))
def test_stream(case):
    check_stream(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=20)
@given(case=cases(INTERPRETER_DTYPES, steps=2))
def test_stream_interpreter(case):
    check_stream(case, "triton")


@pytest.mark.gpu
@settings(max_examples=26)
@given(case=cases(CPU_DTYPES, headdims=(8, 64, 80), dstates=(16, 20, 96, 128, 256), max_groups=3))
def test_stream_gpu(case):
    check_stream(case, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=40)
@given(case=cases(CPU_DTYPES, headdims=(8, 24, 64, 80), max_groups=3))
def test_stream_cuda_gpu(case):
    check_stream(for_cuda(case), implementation("cuda"), "cuda")
