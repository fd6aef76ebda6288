"""Signatures of calls, by the extension's code (compiled here without CUDA) and in Python; addresses of tensors."""

import importlib.util
import resource
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_ops import _signature

CSRC = Path(__file__).resolve().parent.parent / "csrc"
DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float8_e8m0fnu),
)
MODULE = """
#include "common/tensors.h"

PyObject* learn(PyObject*, PyObject* tensor) {
  if (!hybrid_ops::learn_tensor_type(tensor)) return nullptr;
  Py_RETURN_NONE;
}

PyObject* three(PyObject*, PyObject* tensors) {
  std::uintptr_t found[3];
  if (!hybrid_ops::read_addresses(tensors, found, 3)) return nullptr;
  return Py_BuildValue("(KKK)", found[0], found[1], found[2]);
}

PyObject* written(PyObject*, PyObject* bytes) {  // a workspace of the CPU, every byte of it
  hybrid_ops::Workspace workspace;
  const std::int64_t count = PyLong_AsLongLong(bytes);
  if (!workspace.allocate(count, 1, 0)) return nullptr;
  if (count > 0) std::memset(reinterpret_cast<void*>(workspace.address()), 1, count);
  return PyBool_FromLong(workspace.address() != 0);
}

PyMethodDef methods[] = {
    {"learn", learn, METH_O, nullptr},
    {"three", three, METH_O, nullptr},
    {"written", written, METH_O, nullptr},
    {"signature", (PyCFunction)(void*)hybrid_ops::signature, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module{PyModuleDef_HEAD_INIT, "tensors", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_tensors() { return PyModule_Create(&module); }
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    if not CSRC.exists():
        pytest.skip("needs the source checkout")
    cxx, include = shutil.which("g++"), sysconfig.get_paths()["include"]
    if cxx is None or not (Path(include) / "Python.h").exists():
        pytest.skip("needs g++ and Python.h: apt-get install g++ python3-dev")
    folder = tmp_path_factory.mktemp("tensors")
    source, built = folder / "tensors.cpp", folder / f"tensors{sysconfig.get_config_var('EXT_SUFFIX')}"
    source.write_text(MODULE)
    flags = ("-std=c++20", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", f"-I{CSRC}", f"-I{include}")
    subprocess.run([cxx, *flags, str(source), "-o", str(built)], check=True)
    spec = importlib.util.spec_from_file_location("tensors", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.learn(torch.Tensor)
    return module


@pytest.fixture(params=["native", "python"])
def signature(request):
    return _signature.in_python if request.param == "python" else request.getfixturevalue("native").signature


def test_what_is_part_of_it(signature):
    memory = torch.zeros(64)
    base, rest = memory[:16].view(4, 4), (True, 0.5, None, "auto", (0.0, 1.0), torch.float16)
    key = signature(base, *rest, None, base)
    same = (memory[16:32].view(4, 4), torch.nn.Parameter(torch.ones(4, 4)), torch.ones(4, 4, requires_grad=True))
    for other in same:
        found = signature(other, *rest, None, other)
        assert found == key
        assert hash(found) == hash(key)
    for other in (base.mT, base[:2], base.int(), memory[1:17].view(4, 4), base[None], None):
        assert signature(other, *rest, None, base) != key
        assert signature(base, *rest, None, other) != key
    for i in range(len(rest)):
        assert signature(base, *rest[:i], "other", *rest[i + 1 :], None, base) != key
    assert signature(base, *rest, base, None) != key
    assert signature(base, *rest, None, base, None) != key
    with pytest.raises(TypeError, match="unhashable"):
        hash(signature(base, [1, 2]))


def test_dtypes(signature):
    assert len({signature(torch.empty(8, dtype=dtype)) for dtype in DTYPES}) == len(DTYPES)


def test_without_an_address(signature):
    keys = []
    torch.func.vmap(lambda x: (keys.append(signature(x)), x)[1])(torch.randn(2, 8))
    assert keys == [None]


SIZES = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def lists(draw):
    """Tensors of a few shapes, orders, dtypes and offsets, and None."""
    arguments = []
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()) and arguments:
            arguments.append(None)
            continue
        sizes = draw(SIZES)
        memory = torch.zeros(300, dtype=draw(st.sampled_from(DTYPES[:4])))[draw(st.sampled_from((0, 1, 8))) :]
        dense = memory[: torch.Size(sizes).numel()].view(sizes)
        arguments.append(dense.permute(draw(st.permutations(range(len(sizes))))))
    return arguments


@given(lists(), lists())
def test_both_agree(native, first, second):
    equal = _signature.in_python(*first) == _signature.in_python(*second)
    assert (native.signature(*first) == native.signature(*second)) == equal
    assert native.signature(*first) == native.signature(*first)


def test_more_than_it_holds(native):
    assert native.signature(*[torch.zeros(1)] * 170) is not None
    assert native.signature(*[torch.zeros(1)] * 171) is None
    assert native.signature(*[None] * 513) is None


def test_addresses(native):
    x = torch.arange(12.0).view(3, 4)
    assert native.three((x, None, x[1:, 2:])) == (x.data_ptr(), 0, x.data_ptr() + 24)
    assert native.three((torch.zeros(0), torch.nn.Parameter(x), x, "more"))[1:] == (x.data_ptr(), x.data_ptr())
    with pytest.raises(TypeError, match="expected 3 tensors, got 2"):
        native.three((x, x))
    with pytest.raises(TypeError, match=r"expected a torch.Tensor, got int"):
        native.three((x, 3, x))
    with pytest.raises(RuntimeError, match="meta"):
        native.three((x, x, x.to("meta")))


def test_a_workspace(native):
    assert native.written(1 << 20)
    assert not native.written(0)
    with pytest.raises(torch.OutOfMemoryError, match="memory"):
        native.written(1 << 60)


def test_a_workspace_goes_back(native):
    native.written(1 << 26)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    for _ in range(20):
        native.written(1 << 26)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 16


def test_a_type_without_the_table(native):
    with pytest.raises(AttributeError, match="__dlpack_c_exchange_api__"):
        native.learn(int)
    native.learn(torch.Tensor)
