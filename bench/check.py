"""Are a case's results right? A wrong one has no time."""

import math

import torch

from hybrid_ops.budget import measure

from .cases import Case, Tensors

SAMPLE = 2**22  # elements of a large result that are compared with the expected one


def right_results(case: Case, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The expected results, and those of the computation whose error is the budget's measure."""
    expected = case.expected(tensors)
    return expected, expected if case.baseline is None else case.baseline(tensors)


def check(case: Case, expected: Tensors, baseline: Tensors, results: Tensors) -> tuple[float, str]:
    """Error / budget of the worst result, and "passed" or what is wrong.

    The reference is the float32 torch implementation, itself held to float64 by the tests. Of large results SAMPLE
    elements are compared, of the first tokens, the last and evenly spread ones.
    """
    worst = 0.0
    for name, want in expected.items():
        got, base = results[name], baseline[name]
        if not want.is_floating_point():  # bytes, each of which is specified
            wrong = int((got != want).sum())
            if wrong:
                return math.inf, f"{name}: {wrong} of {want.numel()} bytes differ"
            continue
        if got.shape == want.shape and got.numel() > SAMPLE:
            length = got.shape[case.tokens]
            quarter = max(2, SAMPLE * length // got.numel() // 4)
            spread = torch.linspace(0, length - 1, 2 * quarter, device=got.device).long()
            edge = torch.arange(quarter, device=got.device)
            sample = torch.cat([edge, spread, length - 1 - edge])
            got, want, base = (t.index_select(case.tokens, sample) for t in (got, want, base))
        ref, base = (t.double().cpu().numpy() for t in (want, base))
        ratio, complaint = measure(name, got, ref, base, case.budget_dtype, axis=case.axis[name])
        worst = max(worst, ratio)
        if complaint is not None:
            return worst, complaint
    return worst, "passed"
