import json
import re
import subprocess
import sys

import pytest
import torch

import hybrid_ops
from hybrid_ops import cli, selfcheck
from hybrid_ops._torch import norm as torch_norm
from hybrid_ops.selfcheck import IMPLS

BYTES = {"fp8_quantize", "fp8_dequantize", "nvfp4_quantize", "nvfp4_dequantize"}  # of these every byte is specified


@pytest.fixture
def on_cpu_without_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(selfcheck, "interpreter_missing", lambda: "not in this test")


def test_help_teaches(capsys):
    for command in ("info", "check", "demo", "bench"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: hybrid-ops {command}")
        assert len(text.splitlines()) > 4
    with pytest.raises(SystemExit) as stop:
        cli.main(["chekc"])
    assert stop.value.code == 2
    assert "invalid choice: 'chekc'" in capsys.readouterr().err


def test_module_runs():
    command = [sys.executable, "-m", "hybrid_ops", "--version"]
    assert subprocess.check_output(command, text=True).strip() == f"hybrid-ops {hybrid_ops.__version__}"


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "CUDA extension" in text
    for op in hybrid_ops.ops():
        assert op in text


def test_info_names_missing_extras(monkeypatch):
    from hybrid_ops import info

    requires = ["torch>=2.11", 'matplotlib>=3.8 ; extra == "plots"', "no-such-package[x]>=1; extra == 'bench'"]
    monkeypatch.setattr(info.importlib.metadata, "requires", lambda name: requires)
    monkeypatch.setattr(info, "_installed", lambda package: package != "no-such-package")
    assert info.missing_extras() == {"bench": ["no-such-package"]}


def test_info_prints_extras_whole(monkeypatch, capsys):
    monkeypatch.setattr("hybrid_ops.info.missing_extras", lambda: {"nvcc": ["cuda-toolkit"]})
    assert cli.main(["info"]) == 0
    assert "hybrid-ops[nvcc]" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu_without_interpreter")
def test_check_passes(tmp_path, capsys):
    assert cli.main(["check", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    checked = {row["op"] for row in rows if row["skipped"] is None}
    assert checked == set(hybrid_ops.ops()), "every public op has a problem in selfcheck"
    for row in rows:
        if row["skipped"] is None:
            assert set(row["ratio"]) == {"float32", "bfloat16", "float16"}
            exact = row["op"] in BYTES or row["op"] == "moe_sort"  # which moves values and computes none
            assert all(ratio == 0 if exact else 0 < ratio <= 1 for ratio in row["ratio"].values())
    assert "skipped every op (triton): not in this test" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu_without_interpreter")
@pytest.mark.parametrize("op", hybrid_ops.ops())
def test_check_sees_one_percent(op, monkeypatch, capsys):
    function = getattr(hybrid_ops, op)

    def one_percent_more(*args, **kwargs):
        result = function(*args, **kwargs)
        if result is None:
            return kwargs["state"].mul_(1.01)
        if op.endswith("_quantize"):  # quantised: one byte of the data
            result.data.view(torch.uint8)[0, 0, 0] ^= 1
            return result
        return (result[0] * 1.01, *result[1:]) if isinstance(result, tuple) else result * 1.01

    monkeypatch.setattr(hybrid_ops, op, one_percent_more)
    assert cli.main(["check"]) == 1
    wrong = "RMS error" if op not in BYTES else r"\d+ of"
    assert re.search(rf"wrong {op} \(torch\): float32: \w+: {wrong}", capsys.readouterr().out)


@pytest.mark.usefixtures("on_cpu_without_interpreter")
def test_check_sees_one_wrong_implementation(monkeypatch, capsys):
    right = torch_norm.norm_fwd

    def wrong(x, z, residual, weight, y, *rest):
        right(x, z, residual, weight, y, *rest)
        y *= 1.01

    monkeypatch.setattr(torch_norm, "norm_fwd", wrong)
    assert cli.main(["check"]) == 1
    assert f"2 of {len(hybrid_ops.ops())} are wrong" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu_without_interpreter")
def test_check_survives_an_exception(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(hybrid_ops, "rms_norm", broken)
    assert cli.main(["check"]) == 1
    assert "wrong rms_norm (torch): float32: RuntimeError: launch failed" in capsys.readouterr().out


def test_check_of_a_gpu(monkeypatch, capsys):
    """By processes, whose rows are put in order."""
    found = [selfcheck.Row(op, impl, "cuda", {"float32": 0.5}, []) for op in ("moe_sort", "rms_norm") for impl in IMPLS]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selfcheck, "in_background", lambda device: iter(found))
    assert cli.main(["check"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"(rms_norm|moe_sort) +(\w+)", printed) == [
        (op, impl) for impl in IMPLS for op in ("rms_norm", "moe_sort")
    ]
    assert "all 6 are within their budget" in printed


def test_check_in_the_background(monkeypatch):
    """By processes that share the operators; one that dies is a row that is wrong."""
    monkeypatch.setattr(selfcheck, "problems", lambda dtype: ("rms_norm", "moe_sort"))
    rows = list(selfcheck.in_background("cpu", processes=2))
    assert [(row.op, row.impl) for row in rows if row.impl == "torch"] == [("rms_norm", "torch"), ("moe_sort", "torch")]
    assert all(row.passed for row in rows)
    (row,) = selfcheck._rows_of_process(("--device=cpu", "no_such_op"), "cpu", {})
    assert not row.passed


def test_check_runs_triton_in_its_interpreter():
    if (reason := selfcheck.interpreter_missing()) is not None:
        pytest.skip(reason)
    rows = list(selfcheck._interpreter_rows(("rms_norm", "causal_conv1d")))
    assert [row.op for row in rows] == ["rms_norm", "causal_conv1d"]
    for row in rows:
        assert row.passed, row.complaints
        assert set(row.ratio) == {"float32", "float16"}


def test_check_sees_an_interpreter_that_dies(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (row,) = selfcheck._interpreter_rows(("rms_norm",))
    assert not row.passed
    assert "ended early: exit status 1" in row.complaints[0]


def test_bench_names_a_missing_extra(monkeypatch, capsys):
    def without_extra(name):
        raise ImportError("No module named 'pytest_benchmark'", name="pytest_benchmark")

    monkeypatch.setattr(cli.importlib, "import_module", without_extra)
    assert cli.main(["bench", "conv1d"]) == 1
    assert "pytest_benchmark: pip install 'hybrid-ops[bench]'" in capsys.readouterr().out


def test_bench_refuses_an_unknown_family(capsys):
    assert cli.main(["bench", "conv9d"]) == 1
    assert "got 'conv9d'" in capsys.readouterr().out
