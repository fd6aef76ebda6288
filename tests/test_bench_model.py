"""`hybrid-ops bench model`: whole models, beside transformers on the same tensors."""

import re

import pytest
import torch

from hybrid_ops import cli
from hybrid_ops.bench import model, model_check, model_runners, model_size, results
from hybrid_ops.models import PRESETS, NemotronHConfig, NemotronHForCausalLM

SMALL = ["--layers", "4", "--prompt", "16", "--batch", "2", "--context", "16", "--new-tokens", "2"]


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", minversion="5.17")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(model, "ENOUGH_S", 0.0)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def bench(*arguments):
    return cli.main(["bench", "model", *SMALL, *map(str, arguments)])


def fields(path):
    return {(row["op"], row["impl"]): row for row in results.read(path)["rows"]}


@pytest.mark.usefixtures("on_cpu", "transformers")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_the_command_line_to_the_files(dtype, tmp_path, capsys):
    path, page = tmp_path / "rows.json", tmp_path / "rows.html"
    assert bench("--dtype", dtype, "--json", path, "--html", page) == 0
    printed = capsys.readouterr().out
    assert "no GPU here" in printed
    assert "tiny-moe-4L: 1 Mamba-2, 1 MoE, 1 attention, 1 MLP layers" in printed
    assert re.search(r"needs .* that are free: fits", printed)
    assert re.search(r"beside it transformers 5\.\d+.*on the same tensors", printed)
    assert re.search(r"error / budget: hybrid-ops 0\.\d\d, transformers 0\.\d\d, transformers\+patch 0\.\d\d", printed)
    assert re.search(rf"prefill tiny-moe-4L-L16-b1 {dtype} *\n", printed)
    assert re.search(rf"decode tiny-moe-4L-b2-c16 {dtype} *\n", printed)
    for who in ("hybrid-ops eager", "transformers", r"transformers\+patch"):
        assert len(re.findall(rf"^ +{who} +[\d.]+ ", printed, re.MULTILINE)) == 2
    rows = fields(path)
    assert set(rows) == {("prefill", "eager"), ("decode", "eager")}
    for row in rows.values():
        assert row["family"] == "model"
        assert row["dtype"] == dtype
        assert row["check"] == "passed"
        assert row["host_us"] > 0
        assert row["error_ratio"] <= 1
        assert list(row["peers"]) == ["transformers", "transformers+patch"]
        assert all(us > 0 for us in row["peers"].values())
    assert rows["prefill", "eager"]["case"] == "tiny-moe-4L-L16-b1"
    assert rows["decode", "eager"]["case"] == "tiny-moe-4L-b2-c16"
    assert (rows["prefill", "eager"]["tokens"], rows["decode", "eager"]["tokens"]) == (16, 2)
    assert "tiny-moe-4L-b2-c16" in page.read_text()

    assert cli.main(["bench", "model", "--from", str(path), "--compare", str(path)]) == 0
    assert capsys.readouterr().out.count("same") == 2
    assert cli.main(["bench", "model", "--from", str(path), "--fail-above", "5"]) == 1
    assert "--fail-above needs --compare" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu")
def test_without_peers(capsys):
    assert bench("--no-peers") == 0
    assert "transformers" not in capsys.readouterr().out.replace("over transformers", "")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("found", "version", "why"), [(None, "", "not installed"), (object(), "4.57.1", "is 4.57.1")])
def test_transformers_that_is_missing_or_old(found, version, why, monkeypatch, capsys):
    monkeypatch.setattr(model_runners.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(model_runners.importlib.metadata, "version", lambda name: version)
    assert bench() == 0
    printed = capsys.readouterr().out
    assert re.search(f"not compared: transformers .*{why}", printed)
    assert printed.count("hybrid-ops eager") == 2


@pytest.mark.usefixtures("on_cpu", "transformers")
def test_a_peer_that_fails_is_named_with_its_reason(monkeypatch, tmp_path, capsys):
    def full(self, ids, room, quick=False):
        raise torch.OutOfMemoryError("tried to allocate 96 GiB") if self.patch else NotImplementedError("no [cache]")

    monkeypatch.setattr(model_runners.Theirs, "start", full)
    assert bench("--json", tmp_path / "rows.json") == 0
    printed = capsys.readouterr().out
    assert re.search(r"transformers +not timed: NotImplementedError: no \[cache\]", printed)
    assert re.search(r"transformers\+patch +not timed: needs more memory than is free", printed)
    row = fields(tmp_path / "rows.json")["decode", "eager"]
    assert row["peers"] == {"transformers": None, "transformers+patch": None}
    assert set(row["peers_why"]) == set(row["peers"])


@pytest.mark.usefixtures("on_cpu", "transformers")
def test_static_caches_step_by_step(monkeypatch, tmp_path):
    """All that is done for graphs, but for the capture."""
    monkeypatch.setattr(model, "GRAPHS", {"cpu": (False, True)})
    monkeypatch.setattr(model, "Captured", lambda step, tokens: step)
    assert bench("--json", tmp_path / "rows.json") == 0
    rows = fields(tmp_path / "rows.json")
    assert set(rows) == {("prefill", "eager"), ("decode", "eager"), ("decode", "graph")}
    peers = rows["decode", "graph"]["peers"]
    assert list(peers) == ["transformers", "transformers+patch", "transformers+graph", "transformers+patch+graph"]
    assert all(peers.values())
    assert list(rows["prefill", "eager"]["peers"]) == ["transformers", "transformers+patch"]


@pytest.mark.usefixtures("on_cpu", "transformers")
def test_a_capture_that_fails(monkeypatch, tmp_path, capsys):
    def capture(step, tokens):
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        finally:
            raise RuntimeError("the capture was invalidated")  # as torch.cuda.graph does at its end

    monkeypatch.setattr(model, "GRAPHS", {"cpu": (False, True)})
    monkeypatch.setattr(model, "Captured", capture)
    assert bench("--json", tmp_path / "rows.json") == 1
    printed = capsys.readouterr().out
    assert "1 of 3 were not timed" in printed
    assert re.search(r"transformers\+graph +not timed: RuntimeError: operation not permitted", printed)
    assert fields(tmp_path / "rows.json")["decode", "eager"]["check"] == "passed"


@pytest.mark.usefixtures("on_cpu", "transformers")
def test_another_model_is_not_timed(monkeypatch, capsys):
    made = model.transformers_model

    def other(ours):
        theirs = made(ours)
        without_d(theirs)
        return theirs

    monkeypatch.setattr(model, "transformers_model", other)
    assert bench() == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"transformers(?:\+patch)? +not timed: logits: [\d.e+]+ times as far", printed)) == 4
    assert len(re.findall(r"hybrid-ops eager +\d", printed)) == 2


@pytest.mark.usefixtures("on_cpu")
def test_no_one_is_timed_where_ours_is_wrong(monkeypatch, tmp_path, capsys):
    start = model_runners.Ours.start

    def forgetful(self, ids, room, quick=False):
        logits, step = start(self, ids, room)
        return logits, lambda tokens: step(tokens) * 1.1  # of its decoding alone

    monkeypatch.setattr(model_runners.Ours, "start", forgetful)
    assert bench("--json", tmp_path / "rows.json") == 1
    assert "2 of 2 were not timed, for they are wrong" in capsys.readouterr().out
    for row in fields(tmp_path / "rows.json").values():
        assert row["host_us"] is None
        assert row["peers"] == {}


def without_d(theirs):
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "D"):
            layer.mixer.D = torch.nn.Parameter(torch.zeros_like(layer.mixer.D), requires_grad=False)


def other_scaling(theirs):
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "gate"):
            layer.mixer.gate.routed_scaling_factor *= 1.1


def other_epsilon(theirs):
    for layer in theirs.model.layers:
        layer.norm.variance_epsilon = 1e-3


def other_scale(theirs):
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "scaling"):
            layer.mixer.scaling *= 2


def other_experts(theirs):
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "gate"):
            layer.mixer.gate.e_score_correction_bias = torch.zeros_like(layer.mixer.gate.e_score_correction_bias)


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_tells_models_apart(dtype):
    torch.manual_seed(0)
    config = model_size.size("tiny-moe", None, dtype).config
    ours = NemotronHForCausalLM(config, dtype=dtype).eval().requires_grad_(False)
    theirs = model_runners.transformers_model(ours)
    pointers = {tensor.data_ptr() for tensor in ours.state_dict().values()}
    assert {tensor.data_ptr() for tensor in theirs.state_dict().values()} == pointers
    with torch.no_grad(), model_check.decided_routing(ours):
        right = model_check.right(ours)
        for runner in (model_runners.Ours(ours), model_runners.Theirs(theirs)):
            assert 0.4 < model._check(runner, right) < 0.8
        for mutate in (without_d, other_scaling, other_epsilon, other_scale, other_experts):
            theirs = model_runners.transformers_model(ours)
            mutate(theirs)
            with pytest.raises(model.Wrong, match=r"logits: [\d.e+]+ times as far"):
                model._check(model_runners.Theirs(theirs), right)
    biases = [bias for name, bias in ours.named_parameters() if name.endswith("correction_bias")]
    assert biases
    assert not any(bias.any() for bias in biases), "outside the check the load is even"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nemotron-9"], "preset must be one of nemotron-h-4b.*got 'nemotron-9'"),
        (["--layers", "3"], "layers must be 4, one of each kind, to 7, all that the model has, got 3"),
        (["--layers", "8"], "got 8"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--prompt", "16", "-1"], "prompt must be at least 1, got -1"),
        (["--new-tokens", "0"], "new_tokens must be at least 1, got 0"),
        (["--context", "10"], "context must be at least 11.*got 10"),
        (["--dtype", "float16"], "dtype must be float32 or bfloat16 on cpu.*got float16"),
        (["--preset", "nemotron-3-ultra", "--layers", "108"], r"GB are free: --layers \d+ fits|not even one layer"),
    ],
)
def test_bad_options(arguments, message, capsys):
    assert bench(*arguments) == 1
    assert re.search(message, capsys.readouterr().out)


def test_layers_are_a_number_or_fit(capsys):
    with pytest.raises(SystemExit):
        bench("--layers", "some")
    assert "expected a number or 'fit', got 'some'" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "model", "--help"])
    printed = capsys.readouterr().out
    for option in ("--preset", "--layers", "--prompt", "--batch", "--context", "--new-tokens", "--dtype", "--no-peers"):
        assert option in printed
    assert "hybrid-ops bench model --preset nemotron-3-nano --layers 12" in printed
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert "hybrid-ops bench model --help" in capsys.readouterr().out


def test_what_fits(monkeypatch):
    """On a GPU of 80 GB: Nano whole, Super cut, and a hint where someone wants it whole."""
    monkeypatch.setattr(model, "available", lambda device: 84 * 10**9)
    prompts, gpu = [(1, 2048), (1, 8192), (64, 256)], torch.device("cuda")

    def fitting(name, layers):
        needed = lambda size: size.needed(prompts, 64, 288)  # noqa: E731
        return model._fitting(model_size.preset(name), layers, torch.bfloat16, gpu, needed)

    assert fitting("nemotron-3-nano", "fit").name == "nano3-52L"
    cut = fitting("super", "fit")
    assert 84e9 > cut.needed(prompts, 64, 288) > 75e9
    layers = cut.config.num_hidden_layers
    assert cut.name == f"super-{layers}L"
    with pytest.raises(
        ValueError, match=rf"super-88L.* 241\.3 GB in bfloat16.*84\.0 GB are free: --layers {layers} fits"
    ):
        fitting("nemotron-3-super", None)
    monkeypatch.setattr(model, "available", lambda device: 10**9)
    with pytest.raises(ValueError, match="not even one layer of each kind fits"):
        fitting("ultra", "fit")


@pytest.mark.parametrize("name", PRESETS)
def test_cut_keeps_the_mix(name):
    config = NemotronHConfig.preset(name)
    pattern = config.hybrid_override_pattern
    for layers in range(len(set(pattern)), len(pattern) + 1):
        got = model_size.cut(config, layers).hybrid_override_pattern
        assert len(got) == layers
        remaining = iter(pattern)
        assert all(letter in remaining for letter in got), "the order is the model's"
        for letter in set(pattern):
            share = layers * pattern.count(letter) / len(pattern)
            assert got.count(letter) == 1 or abs(got.count(letter) - share) <= 1.5
            assert got.count(letter) >= 1
    assert got == pattern


def test_sizes_and_floors():
    """Of Nemotron 3 Nano, worked out by hand."""
    size = model_size.size("nano3", None, torch.bfloat16)
    assert size.parameters == 31_577_940_288
    assert size.bytes == 2 * size.parameters + 2 * (3 * 64 * 23 + 128 * 23)  # what stays float32
    assert size.active == size.parameters - 131072 * 2688 - 23 * (128 - 6) * 2 * 2688 * 1856
    assert size.cache_bytes(100) - size.cache_bytes(0) == 6 * 2 * 2 * 128 * 2 * 100
    assert size.weights_read(10**6) == size.bytes - 2 * 131072 * 2688
    assert size.decode(1, 256).bytes / 4.3e12 == pytest.approx(1.5e-3, rel=0.02)
    assert size.decode(64, 256).bytes / 4.3e12 == pytest.approx(15.4e-3, rel=0.02)
    assert size.prefill(1, 8192).flops == pytest.approx(51e12, rel=0.02)
    assert size.prefill(2, 8192).flops == 2 * size.prefill(1, 8192).flops
    assert model_size.size("nemotron-3-super", None, torch.bfloat16).parameters < 123_611_033_088  # without its head
    assert set(model_size.NAMES) == set(PRESETS)


def gpu_row(**changes):
    times = {"gpu_us": 5000.0, "gpu_us_p10": 4900.0, "gpu_us_p90": 5100.0, "gpu_us_warm": 5000.0, "host_us": 5100.0}
    return {
        **{"family": "model", "op": "decode", "case": "nano3-52L-b16-c256", "dtype": "bfloat16", "impl": "eager"},
        **{**times, "host_us_p10": 5000.0, "host_us_p90": 5200.0, "bytes": 1, "flops": 1, "floor_us": 1000.0},
        **{"tokens": 16, "peak_bytes": 66 * 10**9, "error_ratio": 0.6, "check": "passed", "commit": "c0ffee"},
        **{"peers": {"transformers": 125000.0, "transformers+graph": None}, "date": "2026-11-24T12:00:00+00:00"},
        **{
            "peers_peak_bytes": {"transformers": 67 * 10**9},
            "peers_why": {"transformers+graph": "no [graph]"},
            **changes,
        },
    }


def test_table_of_a_gpu(tmp_path, capsys):
    machine = {"gpu": "A GPU", "driver": "580", "torch": "2.11", "triton": "3.6", "cuda": "13.0", "clocks": None}
    ceilings = {"copy_tbs": 4.2, "bf16_tflops": 700.0, "fp8_tflops": None}
    rows = [
        gpu_row(),
        gpu_row(impl="graph", gpu_us=2000.0),
        gpu_row(op="prefill", impl="eager", check="out [of] memory"),
    ]
    report = {"machine": machine, "ceilings": ceilings, "commit": None, "date": None}
    results.write(tmp_path / "rows.json", report, [], rows)
    assert cli.main(["bench", "model", "--from", str(tmp_path / "rows.json")]) == 1
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert printed.count("decode nano3-52L-b16-c256 bfloat16") == 1
    assert ["hybrid-ops", "eager", "5.00", "4.90-5.10", "5.10", "3,200", "20%", "66.0", "x25.00"] in lines
    assert ["hybrid-ops", "graph", "2.00", "4.90-5.10", "5.10", "8,000", "50%", "66.0", "x62.50"] in lines
    assert ["transformers", "125.00", "128", "1%", "67.0", "x1.00"] in lines
    assert ["transformers+graph", "not", "timed:", "no", "[graph]"] in lines
    assert ["hybrid-ops", "eager", "out", "[of]", "memory"] in lines


@pytest.mark.gpu
def test_gpu(transformers, tmp_path):
    options = ["--preset", "nemotron-3-nano", "--layers", "4", "--prompt", "300", "--batch", "2", "--context", "64"]
    assert cli.main(["bench", "model", *options, "--new-tokens", "8", "--json", str(tmp_path / "rows.json")]) == 0
    rows = fields(tmp_path / "rows.json")
    assert set(rows) == {("prefill", "eager"), ("decode", "eager"), ("decode", "graph")}
    peers = {"transformers", "transformers+patch", "transformers+graph", "transformers+patch+graph"}
    for row in rows.values():
        assert row["gpu_us"] >= row["floor_us"]
        assert row["host_us"] >= row["gpu_us"]
        assert row["peak_bytes"] > row["bytes"]
    assert set(rows["decode", "graph"]["peers"]) == peers
    assert all(rows["decode", "graph"]["peers"].values()), rows["decode", "graph"]["peers_why"]
    assert rows["decode", "graph"]["gpu_us"] < rows["decode", "eager"]["gpu_us"]
