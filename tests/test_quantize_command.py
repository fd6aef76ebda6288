"""`hybrid-ops quantize`."""

import json
import re

import pytest
import torch

from hybrid_ops import cli

from .quantized_folders import declared, read, stored_format
from .test_quantize import SUPER, save


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("super"), SUPER)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("on_cpu")
def test_report(tmp_path, capsys):
    source, rows = save(tmp_path / "Tiny-BF16", SUPER), tmp_path / "rows.json"
    assert cli.main(["quantize", str(source), "--json", str(rows), "--max-shard-size", "50kB"]) == 0
    text = capsys.readouterr().out
    report = json.loads(rows.read_text())
    assert report["output"] == str(tmp_path / "Tiny-NVFP4")
    assert len(report["files"]) > 1
    declared(tmp_path / "Tiny-NVFP4")
    for row in report["rows"]:
        cells = (row["kind"], row["format"], str(row["matrices"]), f"{100 * row['error']:.2f}%")
        assert re.search(rf"^ +{row['layer']} +" + " +".join(map(re.escape, cells)), text, re.MULTILINE), row
    assert f"{report['bytes_before'] / 1e3:.1f} kB became {report['bytes_after'] / 1e3:.1f} kB" in text
    assert "--input-scale 1 writes it" in text
    assert f"{report['kept']} tensors as they were" in text
    assert "recipe of super" in text


@pytest.mark.usefixtures("on_cpu")
def test_options(source, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["quantize", str(source), "--output", str(out), "--format", "fp8", "--input-scale", "1"]
    command += ["--keep", "*.in_proj", "--rule", "backbone.layers.4.*=nvfp4", "--keep", "*.4.*.out_proj"]
    command += ["--four-over-six", "mse", "--device", "cpu"]
    assert cli.main(command) == 0
    tensors = read(out)
    assert stored_format(tensors, "backbone.layers.0.mixer.in_proj") == "keep"
    assert stored_format(tensors, "backbone.layers.4.mixer.in_proj") == "nvfp4"
    assert stored_format(tensors, "backbone.layers.4.mixer.out_proj") == "keep"
    assert stored_format(tensors, "backbone.layers.1.mixer.experts.0.up_proj") == "fp8"
    assert "input-scale" not in capsys.readouterr().out
    assert cli.main(command) == 1
    assert "hybrid-ops quantize: output must be empty" in capsys.readouterr().out
    assert cli.main([*command, "--force"]) == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--rule", "lm_head"], "expected GLOB=FORMAT, got 'lm_head'"),
        (["--max-shard-size", "5 parsecs"], "expected a size as 500MB or 5GB"),
        (["--format", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_bad_options(source, capsys, option, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["quantize", str(source), *option])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_source(tmp_path, capsys):
    assert cli.main(["quantize", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().out
