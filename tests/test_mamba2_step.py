import pytest
import torch
from hypothesis import given, settings

from .mamba2_step_cases import cases, check_step, for_cuda
from .ssd_update_cases import CPU_DTYPES, INTERPRETER_DTYPES, implementation


@given(case=cases(CPU_DTYPES))
def test_step(case):
    check_step(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=25)
@given(case=cases(INTERPRETER_DTYPES))
def test_step_interpreter(case):
    check_step(case, "triton")


@pytest.mark.gpu
@settings(max_examples=20)
@given(case=cases(CPU_DTYPES, headdims=(8, 24, 64, 80), dstates=(16, 20, 128)))
def test_step_gpu(case):
    check_step(case, "triton", "cuda")


@pytest.mark.gpu
@settings(max_examples=30)
@given(case=cases(CPU_DTYPES))
def test_step_cuda_gpu(case):
    check_step(for_cuda(case), implementation("cuda"), "cuda")
