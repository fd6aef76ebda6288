import functools
import os

import hypothesis
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# shrinking takes minutes where every example may compile kernels or interprets them
SHRINKS = not INTERPRETED and not torch.cuda.is_available()
PHASES = [phase for phase in hypothesis.Phase if phase != hypothesis.Phase.shrink or SHRINKS]

# new examples on every run of a person's, the same ones in CI and in the interpreter, whose few say nothing about rates
SAME = INTERPRETED or os.environ.get("CI") is not None

hypothesis.settings.register_profile(
    "ops", deadline=None, print_blob=not SAME, max_examples=100, phases=PHASES, derandomize=SAME, database=None
)
hypothesis.settings.load_profile("ops")


def pytest_collection_modifyitems(items):
    """Interpreter tests need a process in which triton was imported with TRITON_INTERPRET=1, all others one without."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if ("interpreter" in item.keywords) != INTERPRETED:
            item.add_marker(
                pytest.mark.skip(reason="runs with TRITON_INTERPRET=1" if not INTERPRETED else "runs without")
            )
        elif INTERPRETED and interpreter_cannot_loop():
            item.add_marker(pytest.mark.skip(reason="Triton < 3.7 interprets no computed range() with NumPy >= 2.4"))


@functools.cache
def interpreter_cannot_loop():
    import numpy
    import triton

    return version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4)


def version(text):
    return tuple(int(number) for number in text.split(".")[:2])


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch, request):
    """`new_empty` returns NaN in the library's own calls: whoever reads memory that nothing wrote is found out."""
    if "compile_once" in request.fixturenames:  # dynamo traces torch's own function, not a stand-in
        return
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def memory_is_given_back(request):
    """What a test has kept of the GPU's memory is free for the tests of other processes."""
    yield
    if request.node.get_closest_marker("gpu") is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def compile_once():
    """Compile a function with dynamic shapes; fail if three lengths take more than one graph or give other values."""
    import sysconfig
    from pathlib import Path

    from torch._dynamo.testing import CompileCounterWithBackend

    def run(function, backend, inputs, lengths=(5, 9, 14), device="cpu", grads=(False, True)):
        if backend == "inductor" and not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
            pytest.skip("CPU inductor needs Python.h: apt-get install python3-dev")
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
        for grad in grads if backend == "aot_eager" else (False,):  # inductor takes 10 s a graph
            for length in lengths:
                arguments = [
                    t.clone().to(device).requires_grad_(grad and t.is_floating_point()) for t in inputs(length)
                ]
                twins = [t.detach().clone().requires_grad_(t.requires_grad) for t in arguments]
                got, expected = compiled(*arguments), function(*twins)
                torch.testing.assert_close(got, expected)
                torch.testing.assert_close(arguments, twins)  # what is updated in place is an input
                if grad:
                    for mine, theirs in zip(
                        torch.autograd.grad(got.sum(), [t for t in arguments if t.requires_grad]),
                        torch.autograd.grad(expected.sum(), [t for t in twins if t.requires_grad]),
                        strict=True,
                    ):
                        torch.testing.assert_close(mine, theirs)
                if length == lengths[0]:
                    graphs = counter.frame_count  # the first call may trace again, once a float is known constant
            assert counter.frame_count == graphs, f"recompiled for another length among {lengths}"

    return run
