"""What becomes of benchmark rows: files, comparisons, the HTML report, the command line around them."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from hybrid_ops import cli
from hybrid_ops.bench import harness, report, results
from hybrid_ops.bench.compare import Change, Comparison

CEILINGS = {"copy_tbs": 4.2, "bf16_tflops": 700.0, "fp8_tflops": 1300.0}
CLOCKS = {"sm": "1980 MHz", "sm_max": "1980 MHz", "memory": "3201 MHz", "celsius": "41"}
MACHINE = {"gpu": "A GPU", "driver": "580", "torch": "2.11", "triton": "3.6", "cuda": "13.0"}
MACHINE["clocks"] = {"before": CLOCKS | {"sm": "345 MHz", "celsius": "29"}, "after": CLOCKS}


def row(case="super-L8192-b1", us=100.0, spread=0.02, **changes):
    return {
        **{"family": "ssd", "op": "ssd_chunk_scan_fwd", "case": case, "dtype": "bfloat16", "impl": "triton"},
        **{"gpu_us": us, "gpu_us_p10": us * (1 - spread), "gpu_us_p90": us * (1 + spread), "gpu_us_warm": us},
        **{"gpu_us_sustained": 1.25 * us, "sm_mhz_sustained": 1515},
        **{"host_us": 50.0, "host_us_p10": None, "host_us_p90": None, "bytes": 10**8, "flops": 10**9, "floor_us": 25.0},
        **{"peers": {"mamba_ssm": 3 * us, "torch": None}, "error_ratio": 0.5, "check": "passed"},
        **{"commit": "c0ffee", "date": "2026-11-24T12:00:00+00:00", **changes},
    }


SUSTAINED = ("gpu_us_sustained", "sm_mhz_sustained")
WRONG = row(
    "super-L512-b1", check="y: 3.2 times its budget in <head> 7", error_ratio=float("inf"), peers={}
) | dict.fromkeys(("gpu_us", "gpu_us_p10", "gpu_us_p90", "gpu_us_warm", "host_us", *SUSTAINED))


def older(row):
    """As versions wrote it that measured one figure only."""
    return {name: value for name, value in row.items() if name not in SUSTAINED}


def stored(*rows, **changes):
    head = {"machine": MACHINE, "ceilings": CEILINGS, "commit": "c0ffee", "date": "2026-11-24T12:00:00+00:00"}
    return {**head, "rows": list(rows), **changes}


def write(path, *rows, **changes):
    results.write(path, stored(**changes), [], rows)
    return path


def data_of(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def well_formed(page):
    parser = Balanced()
    parser.feed(page)
    return parser.open == [] and page.startswith("<!doctype html>")


@pytest.mark.parametrize("rows", [[row()], [row(), WRONG], [WRONG]])
def test_page_is_whole_and_needs_nothing_else(rows):
    page = report.page(stored(*rows))
    assert well_formed(page)
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(|fetch\(|https?://|//cdn", page)
    data = data_of(page)
    assert data["machine"] == MACHINE
    assert data["ceilings"] == CEILINGS
    assert [r["gpu_us"] for r in data["rows"]] == [r["gpu_us"] for r in rows]
    assert [r["check"] for r in data["rows"]] == [r["check"] for r in rows]
    assert [[r[name] for name in SUSTAINED] for r in data["rows"]] == [[r[name] for name in SUSTAINED] for r in rows]
    assert data["old"] is None


def test_page_of_rows_without_a_gpu(tmp_path):
    path = tmp_path / "folder" / "report.html"
    rows = harness.run(["norm"], device="cpu", html_path=path)
    data = data_of(path.read_text(encoding="utf-8"))
    assert data["machine"]["gpu"] is None
    assert [r["host_us"] for r in data["rows"]] == [r["host_us"] for r in rows]


@pytest.mark.parametrize("rows", [[row(), WRONG, row("super-L1024-b1", us=7.5)], [WRONG]])
@pytest.mark.parametrize("gpu", [True, False])
def test_the_script_draws(rows, gpu, tmp_path):
    """In a browser, where there is one: the figures are there, what is wrong is called so, nothing is undefined."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser here")
    if not gpu:
        rows = [{**r, **{k: None for k in r if k.startswith(("gpu_us", "sm_mhz"))}, "floor_us": None} for r in rows]
    head = {} if gpu else {"machine": MACHINE | {"gpu": None, "clocks": None}, "ceilings": dict.fromkeys(CEILINGS)}
    path = tmp_path / "report.html"
    path.write_text(report.page(stored(*rows, **head), Comparison(stored(row(us=90.0)))), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    drawn = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60, check=True).stdout
    text = re.sub(r"<script.*?</script>", "", drawn, flags=re.DOTALL)
    assert "wrong, so not timed: y: 3.2 times its budget in &lt;head&gt; 7" in text
    assert ("A GPU" if gpu else "There was no GPU") in text
    assert not re.search("NaN|undefined|Infinity", text)
    if len(rows) == 3 and gpu:
        assert "SM clock 345 MHz before, 1980 MHz after" in text
        for figure in (
            "100",
            "7.50",
            "98.0-102",
            "125 @ 1515 MHz",
            "mamba_ssm 300 (×3.00), torch failed",
            "+11.1% slower",
            "4.20 TB/s",
        ):
            assert figure in text


@pytest.mark.parametrize(
    ("new", "old", "change"),
    [
        (row(us=100.0), row(us=101.0), Change("same", pytest.approx(-0.99, abs=0.01), 101.0)),
        (row(us=100.0), row(us=103.9), Change("same", pytest.approx(-3.75, abs=0.01), 103.9)),
        (row(us=100.0), row(us=105.0), Change("faster", pytest.approx(-4.76, abs=0.01), 105.0)),
        (row(us=105.0), row(us=100.0), Change("slower", pytest.approx(5.0), 100.0)),
        (row(us=105.0, spread=0.1), row(us=100.0), Change("same", pytest.approx(5.0), 100.0)),
        (row(us=105.0, gpu_us_p10=None), row(us=100.0), Change("spread unknown", pytest.approx(5.0), 100.0)),
        (row(), row("super-L512-b1"), Change("new")),
        (row(), row(dtype="float16"), Change("new")),
        (WRONG, row("super-L512-b1"), Change("is wrong")),
        (row("super-L512-b1"), WRONG, Change("was wrong")),
    ],
)
def test_a_change_is_more_than_the_spread(new, old, change):
    assert Comparison(stored(old)).change(new) == change


def test_rows_of_a_cpu_are_compared_by_the_wall_clock():
    cpu = dict.fromkeys(("gpu_us", "gpu_us_p10", "gpu_us_p90")) | {"host_us_p10": 49.0, "host_us_p90": 51.0}
    slower = cpu | {"host_us": 60.0, "host_us_p10": 58.0}
    assert Comparison(stored(row(**cpu))).change(row(**slower)) == Change("slower", pytest.approx(20.0), 50.0)


def test_stored_rows_are_compared_and_drawn(tmp_path, capsys):
    old = write(tmp_path / "old.json", row(us=100.0), row("super-b64", us=50.0))
    new = write(tmp_path / "new.json", row(us=110.0), row("super-b64", us=40.0), row("nano3-b1"))
    html = tmp_path / "report.html"
    command = ["bench", "--from", str(new), "--compare", str(old), "--html", str(html)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    for text in (
        "A GPU",
        "+10.0% slower",
        "-20.0% faster",
        "new",
        "98.0-102.0",
        "mamba_ssm 330.0 (x3.00), torch failed",
    ):
        assert text in printed
    changes = {r["case"]: r["change"]["verdict"] for r in data_of(html.read_text(encoding="utf-8"))["rows"]}
    assert changes == {"super-L8192-b1": "slower", "super-b64": "faster", "nano3-b1": "new"}

    assert cli.main([*command, "--fail-above", "15"]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--fail-above", "5"]) == 1
    assert "ssd_chunk_scan_fwd super-L8192-b1 bfloat16 triton: +10.0%" in capsys.readouterr().out
    assert cli.main([*command, "--fail-above", "5", "--only", "super-b*"]) == 0
    printed = capsys.readouterr().out
    assert "super-b64" in printed
    assert "super-L8192-b1" not in printed


@pytest.mark.parametrize(
    ("shown", "cell"),
    [
        (row(us=110.0), "137.5 @ 1515 MHz"),
        (row(us=110.0, sm_mhz_sustained=None), "137.5"),
        (older(row(us=110.0)), ""),
    ],
    ids=["its clock", "without nvidia-smi", "an older row"],
)
def test_sustained_beside_older_rows(shown, cell, tmp_path, capsys):
    files = write(tmp_path / "new.json", shown), write(tmp_path / "old.json", older(row()))
    html = tmp_path / "report.html"
    command = ["bench", "--from", str(files[0]), "--compare", str(files[1]), "--html", str(html)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert re.search(r"warm +sustained +host", printed)
    assert re.search(rf"110\.0 +{cell} *50 .* \+10\.0% slower", printed)  # between warm and host
    page = html.read_text(encoding="utf-8")
    (drawn,) = data_of(page)["rows"]
    assert {name: drawn.get(name) for name in SUSTAINED} == {name: shown.get(name) for name in SUSTAINED}
    assert '["sustained", (r) => r.gpu_us_sustained' in page
    assert "at the clock that the power limit leaves" in page


def test_wrong_rows_stay_wrong_when_drawn_again(tmp_path, capsys):
    path = write(tmp_path / "rows.json", row(), WRONG)
    assert json.loads(path.read_text())["rows"][1]["error_ratio"] is None  # JSON has no infinity
    assert cli.main(["bench", "--from", str(path), "--html", str(tmp_path / "report.html")]) == 1
    assert "1 of 2 were not timed, for they are wrong" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "No such file"),
        ("{", "got no JSON"),
        ("[]", "without a list 'rows'"),
        ('{"rows": []}', "without machine and gpu"),
        (json.dumps({"machine": MACHINE, "rows": [{"op": "x"}]}), r"rows\[0\] must have .*gpu_us"),
        (json.dumps(stored(row(), ceilings={})), "ceilings must have copy_tbs and bf16_tflops for a GPU, got {}"),
        (json.dumps(stored(row(), row(floor_us=None))), r"rows\[1\] passed and must have numbers for floor_us"),
        (json.dumps(stored(row(), machine=MACHINE | {"gpu": "another"})), "figures of this GPU, None, got another"),
    ],
)
def test_a_file_that_cannot_be_compared_with(text, complaint, tmp_path):
    path, html = tmp_path / "old.json", tmp_path / "report.html"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"{complaint}.*old.json"):
        harness.run(["norm"], device="cpu", compare_path=path, html_path=html)
    assert not html.exists()


@pytest.mark.parametrize("families", [["moe"], []])
def test_nothing_to_show(families, tmp_path):
    path = write(tmp_path / "rows.json", row())
    only = None if families else ["nothing*"]
    with pytest.raises(ValueError, match="expected rows of these families and cases, got none"):
        report.show_stored(path, Console(), families, only)


def test_no_case_of_that_name():
    with pytest.raises(ValueError, match=r"only must name a case of norm, with .*, got ultra"):
        harness.run(["norm"], device="cpu", only=["ultra*"])


def test_only_takes_patterns(capsys):
    rows = harness.run(["norm", "conv1d"], device="cpu", only=["*-gated", "tiny-b?"])
    assert [r["case"] for r in rows] == ["tiny-L256-b2-gated", "tiny-L256-b2-gated", "tiny-b4"]  # forward, backward


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--fail-above", "5"], "--fail-above needs --compare"),
        (["--from", "a.json", "--json", "b.json"], "--from measures nothing"),
        (["--from", "missing.json"], "No such file or directory: missing.json"),
        (["--only", "nothing"], "only must name a case"),
    ],
)
def test_options_that_make_no_sense(options, complaint, capsys):
    assert cli.main(["bench", "norm", *options]) == 1
    assert complaint in capsys.readouterr().out


def test_cases_are_listed_not_measured(capsys):
    assert cli.main(["bench", "ssd", "--list", "--all", "--only", "ultra-L131072-*"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"ssd_chunk_scan_fwd +ultra-L131072-b1 +bfloat16 +9,193\.9 +1,391\.6", printed)
    assert "2 cases" in printed
    assert cli.main(["bench", "norm", "--list"]) == 0
    assert "tiny-L256-b2-gated" in capsys.readouterr().out


def test_pytest_benchmark_stores_what_the_harness_measured(tmp_path):
    """Not the wall time of the test's calls: the stored figures are those of the rows, in seconds."""
    pytest.importorskip("pytest_benchmark", reason="pip install 'hybrid-ops[bench]'")
    script = tmp_path / "run.py"
    script.write_text(
        "import pytest, sys\n"
        "from hybrid_ops.bench import harness\n"
        "def measure(case, impl, sets, row, device):\n"
        "    row |= {'error_ratio': 0.5, 'check': 'passed'}\n"
        "    return [3e6, 1e6, 2e6]\n"
        "harness.measure = measure\n"
        "sys.exit(pytest.main(['--pyargs', 'hybrid_ops.bench.pytest_cases', '-q', *sys.argv[1:]]))\n"
    )
    stored = tmp_path / "stored.json"
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-k", "tiny-b4", f"--benchmark-json={stored}"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # xdist's
    environment = inherited | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {entry["name"]: entry["stats"] for entry in json.loads(stored.read_text())["benchmarks"]}
    assert set(found) == {
        "test_case[causal_conv1d_update-tiny-b4-bfloat16-torch]",
        "test_case[mamba2_step-tiny-b4-bfloat16-torch]",
        "test_case[ssd_replay_update-tiny-b4-T2-a1-float32-torch]",
        "test_case[ssd_state_update-tiny-b4-float32-torch]",
    }
    for stats in found.values():
        assert [stats[name] for name in ("min", "median", "max")] == pytest.approx([1.0, 2.0, 3.0])
