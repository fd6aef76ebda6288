import torch
from hypothesis import given, settings

from .mamba2_step_cases import cases, check_step

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(case=cases(CPU_DTYPES))
def test_step(case):
    check_step(case, "torch")
