"""Every script of examples/ as a user runs it: a process of its own, in an empty folder, without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(name, folder):
    """What the example prints; only what finds programs and the package is left of the environment."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr, "an example does not warn"
    return result.stdout


def numbers(pattern, printed):
    """The group of every match, as floats."""
    found = re.findall(pattern, printed)
    assert found, f"{pattern!r} is not in:\n{printed}"
    return [float(value.replace(",", "")) for value in found]


def call_one_op(printed):
    assert numbers(r"mean square of the rows ([\d.]+),", printed)[0] == pytest.approx(1, abs=2e-3)
    assert numbers(r"of the sum before ([\d.]+)", printed)[0] == pytest.approx(2, abs=0.3)
    assert numbers(r"in two pieces it differs by (\S+)", printed)[0] < 1e-5
    assert re.findall(r"explain: (\w+) runs in torch, the tensors are on the CPU", printed) == [
        "rms_norm",
        "ssd_chunk_scan",
    ]
    assert "a wrong argument: A must have shape (8,), got (7,)" in printed


def torch_compile(printed):
    assert re.findall(r"length (\d+): ([\w ]+);", printed) == [
        ("100", "compiled"),
        ("257", "nothing to compile"),
        ("1000", "nothing to compile"),
    ]
    assert max(numbers(r"differ from eager's by (\S+)", printed)) < 1e-5


def train_two_steps(printed):
    first, *_, last = losses = numbers(r"after \d steps: loss ([\d.]+)", printed)
    assert len(losses) == 3
    assert first == pytest.approx(5.55, abs=0.3)  # ln 256: an untrained model knows nothing
    assert last < first - 0.5


def own_hybrid_block(printed):
    assert "parameters without a gradient: 0" in printed
    assert numbers(r"differ from all at once by (\S+)", printed)[0] < 1e-4


def quantize_and_run(printed):
    before, after = (numbers(pattern, printed)[0] for pattern in (r"([\d,]+) bytes became", r"became ([\d,]+)"))
    assert after < 0.7 * before
    assert 0.05 < numbers(r"nvfp4: relative error of the weights up to (\S+)", printed)[0] < 0.12
    assert 0.01 < numbers(r"logits: (\S+) away", printed)[0] < 0.3
    assert "Nvfp4Weight" in printed
    assert re.search(r"generated: \[(\d+, ){7}\d+\]", printed)


def drop_in(printed):
    assert numbers(r"root mean square (\S+)", printed)[0] == pytest.approx(1, abs=1e-2)
    assert numbers(r"the scan's last token to (\S+)", printed)[0] < 1e-5


OUTCOMES = [call_one_op, torch_compile, train_two_steps, own_hybrid_block, quantize_and_run, drop_in]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: outcome.__name__)
def test_example(outcome, tmp_path):
    outcome(run(outcome.__name__, tmp_path))


def test_every_example_is_tested_and_says_how_to_run_it():
    files = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(files) == {outcome.__name__ for outcome in OUTCOMES}
    for name, source in files.items():
        assert f"\n    python examples/{name}.py" in source
        assert len(source.splitlines()) <= 75
