import dataclasses
import itertools
import json
import re
import types

import pytest
import torch

from hybrid_ops import cli
from hybrid_ops.bench import (
    check,
    conv1d,
    gemm,
    grouped_gemm,
    harness,
    mamba2_step,
    moe,
    moe_router,
    norm,
    quant,
    ssd,
    timing,
)
from hybrid_ops.bench.cases import MIXERS, MODELS, WIDTHS

FAMILIES = {
    "conv1d": conv1d,
    "ssd": ssd,
    "norm": norm,
    "mamba2_step": mamba2_step,
    "moe_router": moe_router,
    "grouped_gemm": grouped_gemm,
    "moe": moe,
    "quant": quant,
    "gemm": gemm,
}
ROW = {
    *("family", "op", "case", "dtype", "impl", "gpu_us", "gpu_us_p10", "gpu_us_p90", "gpu_us_warm"),
    *("gpu_us_sustained", "sm_mhz_sustained", "host_us", "host_us_p10", "host_us_p90"),
    *("bytes", "flops", "floor_us", "peers", "error_ratio", "check", "commit", "date"),
}
UNMEASURED = {"ceilings": dict.fromkeys(("copy_tbs", "bf16_tflops", "fp8_tflops")), "commit": None, "date": ""}


def gpu_cases():
    return [case for family in FAMILIES.values() for case in family.cases(on_gpu=True)]


def swept_cases():
    return [case for family in FAMILIES.values() for case in family.sweep()]


def test_the_sweep_has_every_model_and_size():
    cases = swept_cases()
    assert all(case.bytes > 0 and case.flops >= 0 for case in cases)
    names = {case.name for case in cases}
    assert {name.split("-")[0] for name in names if not name[0].isdigit()} == {*MIXERS, *WIDTHS}
    for model, length in itertools.product(MIXERS, (512, 131072)):
        assert {f"{model}-L{length}-b1", f"{model}-L{length}-b1-tp8"} <= names
    assert {"ultra-b1", "ultra-b512-tp8", "super-T1", "nano3-T131072-up-tp8"} <= names


def test_a_sweep_repeats_no_other_case():
    chosen = list(harness.select(list(FAMILIES), torch.device("cuda"), only=None, every=True))
    assert len(chosen) == len({(case.op, case.name, case.dtype) for _, case in chosen})
    assert len(chosen) > len(gpu_cases())


@pytest.mark.parametrize(
    "case",
    [
        conv1d.conv1d("tiny", 64, 1, strided=True, tp=2),
        conv1d.conv1d_bwd("tiny", 64, 1, tp=2),
        conv1d.conv1d_update("tiny", 2, tp=2),
        mamba2_step.mamba2_step("tiny", 2, tp=2),
        ssd.ssd("tiny", 64, 1, tp=2),
        ssd.ssd_update("tiny", 2, torch.float32, tp=2),
        ssd.ssd_update("tiny", 2, torch.float16, tp=2, stochastic=True),
        norm.gated_norm("tiny", 64, 1, tp=2),
        norm.gated_norm_bwd("tiny", 64, 1, tp=2),
        grouped_gemm.up("tiny", 64, tp=2),
        grouped_gemm.down("tiny", 64, tp=2),
        moe.routed("tiny", 64, tp=2),
        moe.whole("tiny", 64, tp=2),
        gemm.grouped("tiny", 64, gemm.W4A16, tp=2),
    ],
    ids=lambda case: f"{case.op}-{case.name}",
)
def test_a_part_of_a_layer_is_right_too(case):
    (row,) = harness.measure_case("any", case, torch.device("cpu"), UNMEASURED)
    assert row["check"] == "passed"
    assert row["case"].endswith("-tp2")


def test_what_does_not_fit_is_skipped_with_its_reason(monkeypatch, capsys):
    def full(device, generator):
        raise torch.OutOfMemoryError("tried to allocate 96 GiB")

    large, other = conv1d.conv1d("tiny", 64, 1), conv1d.conv1d("tiny", 32, 1)
    monkeypatch.setattr(conv1d, "cases", lambda on_gpu: [dataclasses.replace(large, make=full), other])
    rows = harness.run(["conv1d"], device="cpu")
    assert [row["case"] for row in rows] == ["tiny-L32-b1"]
    printed = capsys.readouterr().out
    assert "skipped: conv1d_fwd tiny-L64-b1 bfloat16: needs more memory than this GPU has: tried to allocate" in printed


def test_a_case_larger_than_the_gpu_is_not_tried(monkeypatch):
    gpu = types.SimpleNamespace(L2_cache_size=50 * 2**20, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with pytest.raises(harness.Skipped, match="needs 86 GB at least, this GPU has 80"):
        harness.input_sets(moe.routed("ultra", 8192), torch.device("cuda"))


def test_every_family_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "figures.json"
    rows = harness.run(list(FAMILIES), json_path=path, device="cpu")
    assert {row["family"] for row in rows} == set(FAMILIES)
    assert all(set(row) == ROW for row in rows)
    assert all(row["check"] == "passed" and row["host_us"] > 0 and row["gpu_us"] is None for row in rows)
    report = json.loads(path.read_text())
    assert set(report) == {"machine", "ceilings", "commit", "date", "rows"}
    assert set(report["machine"]) == {"gpu", "driver", "torch", "triton", "cuda", "clocks"}
    assert set(report["ceilings"]) == {"copy_tbs", "bf16_tflops", "fp8_tflops"}
    assert report["rows"] == rows
    printed = capsys.readouterr().out
    assert "no GPU here" in printed
    assert all(row["case"] in printed for row in rows)


def test_a_file_keeps_the_newest_row_of_each_case(tmp_path):
    path = tmp_path / "figures.json"
    first = harness.run(["norm", "conv1d"], json_path=path, device="cpu")
    report = json.loads(path.read_text())
    for row in report["rows"]:
        row["date"] = "long ago"
    path.write_text(json.dumps(report))
    harness.run(["norm"], json_path=path, device="cpu")
    merged = json.loads(path.read_text())["rows"]
    assert len(merged) == len(first)
    assert {row["family"]: row["date"] == "long ago" for row in merged} == {"norm": False, "conv1d": True}


def test_a_file_of_another_gpu_is_refused(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text(
        json.dumps({"machine": {"gpu": "another"}, "ceilings": {"copy_tbs": 4.2, "bf16_tflops": 700.0}, "rows": []})
    )
    with pytest.raises(ValueError, match="got another"):
        harness.run(["norm"], json_path=path, device="cpu")


def test_unknown_family():
    with pytest.raises(ValueError, match=f"family must be one of {', '.join(FAMILIES)}, got 'attention'"):
        harness.run(["attention"])


def one_percent_wrong(results):
    return {name: value * 1.01 for name, value in results.items()}


def never_written(results):
    return {name: torch.full_like(value, float("nan")) for name, value in results.items()}


@pytest.mark.parametrize("break_it", [one_percent_wrong, never_written])
def test_wrong_results_are_not_timed(break_it, monkeypatch, tmp_path):
    good, other = conv1d.conv1d("tiny", 64, 1), conv1d.conv1d("tiny", 32, 1)
    broken = dataclasses.replace(good, call=lambda t, impl: break_it(good.call(t, impl)))
    monkeypatch.setattr(conv1d, "cases", lambda on_gpu: [broken, other])
    path = tmp_path / "figures.json"
    with pytest.raises(RuntimeError, match="1 of 2 were not timed, for they are wrong:\nconv1d_fwd tiny-L64-b1 torch"):
        harness.run(["conv1d"], json_path=path, device="cpu")
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["tiny-L64-b1"]["host_us"] is None
    assert rows["tiny-L32-b1"]["host_us"] > 0  # one broken case does not cost the others


def test_an_exception_costs_one_row():
    def raises(tensors, impl):
        raise RuntimeError("out of memory")

    broken = dataclasses.replace(conv1d.conv1d("tiny", 64, 1), call=raises)
    (row,) = harness.measure_case("conv1d", broken, torch.device("cpu"), UNMEASURED)
    assert row["check"] == "RuntimeError: out of memory"


def test_ctrl_c_shows_what_was_measured(monkeypatch, tmp_path, capsys):
    def interrupted(tensors, impl):
        raise KeyboardInterrupt

    good, bad = conv1d.conv1d("tiny", 64, 1), conv1d.conv1d("tiny", 48, 1)
    bad = dataclasses.replace(bad, call=lambda t, impl: never_written(good.call(t, impl)))  # no other exit status
    last = dataclasses.replace(conv1d.conv1d("tiny", 32, 1), call=interrupted)
    monkeypatch.setattr(conv1d, "cases", lambda on_gpu: [good, bad, last])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = tmp_path / "figures.json", tmp_path / "report.html"
    assert cli.main(["bench", "conv1d", "--json", str(files[0]), "--html", str(files[1])]) == 130
    printed, errors = capsys.readouterr()
    assert re.search(r"^1 of 3: conv1d_fwd tiny-L64-b1 bfloat16: torch \d+\.\d µs$", printed, re.MULTILINE)
    assert re.search(r"^2 of 3: conv1d_fwd tiny-L48-b1 bfloat16: torch wrong$", printed, re.MULTILINE)
    assert "3 of 3" not in printed
    assert re.search(r"^ *conv1d_fwd +tiny-L64-b1 +bfloat16 +torch +\d", printed, re.MULTILINE)
    assert [row["case"] for row in json.loads(files[0].read_text())["rows"]] == ["tiny-L64-b1", "tiny-L48-b1"]
    assert "tiny-L64-b1" in files[1].read_text()
    assert errors == "interrupted\n"


def test_a_peer_that_fails_costs_nothing_else():
    def raises(tensors):
        raise RuntimeError("not on this machine")

    case = dataclasses.replace(conv1d.conv1d("tiny", 64, 1), peers={"other": raises, "quick": lambda t: t["x"] + 1})
    with pytest.warns(UserWarning, match="other failed: RuntimeError: not on this machine"):
        (row,) = harness.measure_case("conv1d", case, torch.device("cpu"), UNMEASURED)
    assert row["peers"]["other"] is None
    assert row["peers"]["quick"] > 0
    assert row["host_us"] > 0


@pytest.mark.parametrize("tokens", [3, 1000])
def test_a_sample_has_both_ends(tokens, monkeypatch):
    """Of large results a sample is compared: an error in the first or the last token is found all the same."""
    monkeypatch.setattr(check, "SAMPLE", 256)
    case = conv1d.conv1d("tiny", tokens, 1)
    tensors = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
    expected = case.expected(tensors)
    assert check.check(case, expected, expected, case.call(tensors, "torch"))[1] == "passed"
    for token in (0, -1):
        results = case.call(tensors, "torch")
        results["y"][:, token] = 0
        assert check.check(case, expected, expected, results)[1] != "passed"


@pytest.mark.parametrize("cases", [gpu_cases, swept_cases])
def test_cases_have_unique_agreed_names(cases):
    names = [(case.op, case.name, case.dtype) for case in cases()]
    assert len(set(names)) == len(names)
    sequences = r"(-L\d+)?-b\d+(-(strided|channel-last|packed\d+|residual|gated|normed|stochastic|tp8|T\d+-a\d))*"
    tokens = (
        r"-T\d+(-(up|down|tensor|row|1x128|128x128|mx|column|1x16|16x16|swizzled|hadamard|modelopt|4over6|w4a16|tp8))*"
    )
    dense = r"\d+x\d+x\d+-(row|1x128|mx|w4a16|w4a8|w4a4)"
    pattern = re.compile(rf"({'|'.join(MODELS)})({sequences}|{tokens})|{dense}")
    assert all(pattern.fullmatch(name) for _, name, _ in names)


@pytest.mark.parametrize(
    ("op", "case", "dtype", "floor"),
    [  # the floors that docs/measured.md compares with, at 4.3 TB/s and 790 TFLOP/s
        ("conv1d_fwd", "super-L8192-b1-strided", torch.bfloat16, 79),
        ("conv1d_fwd", "super-L65536-b1-strided", torch.bfloat16, 632),
        ("conv1d_fwd", "nano3-L2048-b8-strided", torch.bfloat16, 95),
        ("conv1d_bwd", "super-L8192-b1-strided", torch.bfloat16, 118),
        ("conv1d_bwd", "super-L65536-b1-strided", torch.bfloat16, 947),
        ("ssd_chunk_scan_fwd", "super-L8192-b1", torch.bfloat16, 72),
        ("ssd_chunk_scan_fwd", "nano3-L8192-b1", torch.bfloat16, 40),
        ("ssd_chunk_scan_fwd", "nano2-L8192-b1", torch.bfloat16, 88),
        ("ssd_chunk_scan_fwd", "h56b-L8192-b1", torch.bfloat16, 198),
        ("ssd_state_update", "super-b64", torch.float32, 125),
        ("ssd_state_update", "super-b64", torch.bfloat16, 63),
        ("ssd_replay_update", "super-b64", torch.float32, 70),
        ("ssd_replay_update", "nano3-b64-T4-a4", torch.float32, 42),
        ("mamba2_step", "nano3-b16", torch.bfloat16, 16),
        ("norm_fwd", "super-L8192-b1-gated", torch.bfloat16, 95),
        ("norm_bwd", "super-L8192-b1-gated", torch.bfloat16, 158),
    ],
)
def test_floors(op, case, dtype, floor):
    (found,) = [c for c in gpu_cases() if (c.op, c.name, c.dtype) == (op, case, dtype)]
    us = harness.floor_us(found, {"copy_tbs": 4.3, "bf16_tflops": 790.0})
    assert us == pytest.approx(floor, rel=0.02)  # the literature's figures are rounded to whole microseconds


def test_summary():
    assert timing.summary([float(i) for i in range(101)]) == (50.0, 10.0, 90.0)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    path = tmp_path / "figures.json"
    page = tmp_path / "report.html"
    rows = harness.run(["conv1d", "ssd"], json_path=path, only=("super-b1",), html_path=page)
    assert rows
    assert all(0 < row["gpu_us_p10"] <= row["gpu_us"] <= row["gpu_us_p90"] for row in rows)
    assert all(row["floor_us"] > 0 and row["host_us"] > 0 and row["gpu_us_warm"] > 0 for row in rows)
    assert all(row["gpu_us_sustained"] > 0 and row["sm_mhz_sustained"] > 0 for row in rows)
    report = json.loads(path.read_text())
    assert report["ceilings"]["copy_tbs"] > 0
    assert {when: clocks["sm"].split()[1] for when, clocks in report["machine"]["clocks"].items()} == {
        "before": "MHz",
        "after": "MHz",
    }
    assert torch.cuda.get_device_name() in page.read_text()
    harness.run(["conv1d", "ssd"], only=("super-b1",), compare_path=path)
