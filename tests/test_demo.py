import json
import math
import re
import zlib

import numpy as np
import pytest
import torch

from hybrid_ops import cli, selfcheck
from hybrid_ops.demo import prove, report, run, text, train
from hybrid_ops.demo.report import Results

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus():
    return text.corpus()


@pytest.fixture(scope="module")
def model():
    """Untrained, but with logits that differ."""
    model = train.new_model(train.Recipe(), CPU)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def test_corpus_is_prose_and_the_held_out_part_unseen(corpus):
    total = len(corpus.train) + len(corpus.held_out)
    assert 350e3 < total < 550e3  # 412 kB in Python 3.11; it grows with every version
    assert 0.04 < len(corpus.held_out) / total < 0.06
    assert not re.search(rb"[^\n -~]|::=|\||\+--", corpus.train + corpus.held_out)
    assert corpus.shared <= 0.03
    assert not set(corpus.train_topics) & set(corpus.held_out_topics)
    assert text.corpus() == corpus


def test_a_topic_that_is_part_of_another_is_not_held_out():
    def body(name):
        return "".join(f"line {i} of the topic {name}, which is long enough\n" for i in range(10))

    own = {f"own{i}": body(f"own{i}") for i in range(40)}
    inner = {f"inner{i}": body(f"inner{i}") for i in range(40)}
    cut = text.hold_out(own | inner | {"outer": "".join(inner.values())})
    assert cut.held_out_topics
    assert all(name.startswith("own") for name in cut.held_out_topics)
    assert cut.shared == 0


def test_compressors(corpus):
    sizes = text.compressors(corpus)
    assert set(sizes) == {"zlib", "bz2", "xz"}
    assert sizes["zlib"].alone == 8 * len(zlib.compress(corpus.held_out, 9)) / len(corpus.held_out)
    for size in sizes.values():
        assert 1 < size.primed < size.alone < 4


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ngram_is_a_distribution(n):
    """The probabilities of all bytes after one history sum to 1: measured, each by the last byte's bits."""
    words = b"the cat sat on the mat, the rat sat on the cat. " * 3
    history = b"the m"
    before = len(history) * text.ngram_bits(words, history, n)
    total = sum(
        2 ** (before - (len(history) + 1) * text.ngram_bits(words, history + bytes([b]), n)) for b in range(256)
    )
    assert math.isclose(total, 1, rel_tol=1e-9)


def test_ngram_learns_what_repeats_and_nothing_else():
    noise = np.random.default_rng(0).integers(0, 256, 40000).astype(np.uint8).tobytes()
    assert text.ngram_bits(noise[:20000], noise[20000:], 3) > 7.9
    assert text.ngram_bits(b"abcdefgh" * 100, b"abcdefgh" * 10, 4) < 0.1


def test_best_ngram_is_chosen_without_the_held_out_text(corpus):
    n, bits = text.best_ngram(corpus, (1, 2))
    assert n == 2
    assert bits == text.ngram_bits(corpus.train, corpus.held_out, 2)
    swapped = corpus._replace(held_out_topics={"none": "zzzz"})
    assert text.best_ngram(swapped, (1, 2))[0] == 2


def test_training_is_the_same_every_time_and_learns(corpus):
    recipe = train.Recipe(steps=2, batch=2, length=64)
    runs = [list(train.train(train.new_model(recipe, CPU), corpus.train, recipe)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert abs(runs[0][0] - math.log(256)) < 0.4  # nothing is known at the start
    assert runs[0][-1] < runs[0][0]


def test_visit_leaves_the_model_as_it_was():
    recipe = train.Recipe(batch=2, length=16)
    model = train.new_model(recipe, CPU)
    before = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    train.visit(model, recipe)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_learning_rate():
    recipe = train.Recipe()
    rates = [recipe.learning_rate(step) for step in range(recipe.steps)]
    assert max(rates) == pytest.approx(recipe.peak, rel=0.01)
    assert rates[0] < recipe.peak / 5
    assert rates[-1] < recipe.peak / 30


def test_surprise(model):
    """In pieces with enough context, as at once; a model that knows nothing needs 8 bits."""
    sample = b"If the object is callable, it is called with no argument." * 2
    with torch.no_grad():
        logits = model(train.as_ids(b"\n" + sample[:-1], CPU)[None])[0]
    expected = -logits.log_softmax(-1).gather(1, train.as_ids(sample, CPU)[:, None])[:, 0] / math.log(2)
    in_pieces = train.surprise(model, sample, stride=50, context=len(sample))
    np.testing.assert_allclose(in_pieces, expected.numpy(), atol=1e-4)  # float32 logits of a few units
    ignorant = train.new_model(train.Recipe(), CPU)
    torch.nn.init.zeros_(ignorant.lm_head.weight)
    np.testing.assert_allclose(train.surprise(ignorant, sample), 8, atol=1e-5)


def test_writing_is_the_same_every_time(model):
    first, second = (b"".join(prove.write(model, b"When ", 8)) for _ in range(2))
    assert first == second
    assert len(first) == 8


def test_speed_counts_what_is_kept(model, corpus):
    near, far = (prove.speed(model, corpus.train, position, steps=2) for position in (10, 30))
    config = model.config
    state = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
    window = config.conv_dim * (config.conv_kernel - 1)
    assert near.fixed == far.fixed == 3 * 4 * (state + window)
    assert far.keys_values == 3 * near.keys_values == 30 * 2 * config.num_key_value_heads * config.head_dim * 4
    assert far.all_attention == 4 * far.keys_values


def test_proofs_hold_and_can_fail(model, corpus, monkeypatch):
    sample = corpus.held_out[:64]
    proofs = [prove.against_reference(model, sample), *prove.ways_of_reading(model, sample)]
    assert [proof.holds for proof in proofs] == [True, True, True]
    right = prove.reference.forward

    def without_skip(weights, *args):
        return right({name: w * (0 if name.endswith("mixer.D") else 1) for name, w in weights.items()}, *args)

    monkeypatch.setattr(prove.reference, "forward", without_skip)
    assert not prove.against_reference(model, sample).holds


def test_loads(model, corpus):
    """Four experts for each byte, in the backbone's two mixtures of 16."""
    sample = corpus.held_out[:100]
    loads = prove.loads(model, sample)
    assert [load.shape for load in loads] == [(16,), (16,)]
    assert all(load.sum() == pytest.approx(4) for load in loads)


def test_drafting(model, corpus, monkeypatch):
    """The same bytes with drafts and without; and other bytes are found out."""
    sizes = dict(drafts=2, prompts=3, length=12)
    result = prove.drafting(model, corpus.held_out, **sizes)
    assert result.proof.holds
    assert len(result.acceptance) == 2
    assert 1 <= result.per_pass <= 3
    greedy = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: (greedy(*args, **kwargs) + 1) % 256)
    other = prove.drafting(model, corpus.held_out, **sizes)
    assert not other.proof.holds
    assert "0 of 3 texts" in other.proof.detail


def test_watch(model):
    memory = prove.watch(model, b"one head of eight")
    assert memory.states.shape == (17, 32, 32)
    assert memory.layer == 5
    assert np.abs(np.diff(memory.states, axis=0)).max(axis=(1, 2)).min() > 0


def finished(**changes):
    results = Results(
        "a machine", train.Recipe(steps=2), text.Corpus({"a": "aa"}, {"b": "</script>\n"}, 0.0), b"Wh", "M*-", 7
    )
    results.losses = [5.5, 2.0]
    results.surprise = np.full(10, 1.5)
    results.compressors = {"zlib": text.Compressed(2.0, 2.5)}
    results.ngram = (5, 1.75)
    results.samples = [(0, b"\x00<b>"), (2, b"en")]
    results.written = b"at"
    results.loads = [np.array([0.5, 1.5])]
    results.speeds = [prove.Speed(100, 50.0, 10, 20, 80)]
    results.drafting = prove.Drafting([0.75, 0.5], 2.25, prove.Proof("drafts", 0.0, True))
    results.proofs = [prove.Proof("claim", 1e-6, True)]
    results.memory = prove.Memory(b"ab", 5, 1, np.stack([np.eye(3), -np.eye(3)]))
    results.ops = [selfcheck.Row("rms_norm", "torch", "cpu", {"float32": math.inf}, ["wrong"])]
    for name, value in changes.items():
        setattr(results, name, value)
    return results


def embedded(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def test_page_needs_nothing_else():
    page = report.page(finished())
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)""", page)
    assert "@@" not in page
    data = embedded(page)
    assert data["heldOut"] == "</script>\n"  # text cannot end the script
    assert data["samples"] == [[0, "·<b>"], [2, "en"]]
    assert data["rivals"] == {"5-gram": 1.75, "zlib": 2.0}
    assert data["bits"] == 1.5
    assert data["surprise"] == [15] * 10
    assert data["loads"] == [[0.5, 1.5]]
    assert data["acceptance"] == [0.75, 0.5]
    assert data["ops"][0]["ratio"] == {"float32": None}
    assert data["ops"][0]["passed"] is False


def test_page_fills_every_place_that_its_script_names():
    page = report.page(finished())
    named = set(re.findall(r'\bat\("([\w-]+)"\)', page))
    assert named <= set(re.findall(r'\bid="([\w-]+)"', page))
    used = set(re.findall(r"\bdata\.(\w+)", page)) - {"textContent"}
    assert used <= set(embedded(page))


def test_states_as_bytes():
    import base64

    code = np.frombuffer(base64.b64decode(report._as_bytes(np.array([-1.0, 0, 0.25, 1]))), np.uint8)
    assert code.tolist()[:2] == [1, 128]
    assert 190 <= code[2] <= 193  # square root of a quarter
    assert code[3] == 255


def test_demo_runs_and_fails_after_three_steps(tmp_path, monkeypatch, capsys, corpus):
    """Everything is there; and a model that has hardly learnt is not passed."""
    topics = dict(sorted(corpus.train_topics.items(), key=lambda item: len(item[1]))[:40])
    monkeypatch.setattr(text, "corpus", lambda: text.hold_out(topics))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(selfcheck, "interpreter_missing", lambda: "not in this test")
    monkeypatch.setattr(selfcheck, "in_background", lambda device, processes: selfcheck.rows(device))
    monkeypatch.setattr(run, "POSITIONS", (10, 100))
    for size in ("SAMPLE_BYTES", "WRITTEN_BYTES", "TIMED_BYTES", "WATCHED_BYTES", "DRAFTED_BYTES", "LOAD_BYTES"):
        monkeypatch.setattr(run, size, 16)
    monkeypatch.setattr(run, "PROVED_BYTES", 60)
    page, svg = tmp_path / "demo.html", tmp_path / "demo.svg"
    assert cli.main(["demo", "--steps", "3", "--html", str(page), "--svg", str(svg)]) == 1
    printed = capsys.readouterr().out
    assert printed.rstrip().splitlines()[-1] == str(page)
    assert re.search(r"failed: \d\.\d\d bits per unseen byte, more than 2.2", printed)
    assert printed.count("failed:") == 1
    for line in ("after   0 steps", "after   3 steps", "nats at the start", "yes  the model computes", "this model"):
        assert line in printed
    data = embedded(page.read_text())
    assert len(data["losses"]) == 3
    assert len(data["surprise"]) == data["heldOutBytes"]
    assert svg.read_text().lstrip().startswith("<svg")


def test_what_counts_as_failure():
    right = selfcheck.Row("rms_norm", "torch", "cpu", {"float32": 0.5}, [])
    assert run.failures(finished(ops=[right])) == []
    assert run.failures(finished(ops=[right], surprise=np.full(9, 2.201))) == [
        "2.20 bits per unseen byte, more than 2.2"
    ]
    assert len(run.failures(finished(ops=[right], surprise=np.full(9, math.nan)))) == 1
    assert run.failures(finished()) == ["rms_norm (torch) is wrong"]
    assert run.failures(finished(ops=[], proofs=[prove.Proof("one = one", 1.0, False)])) == ["not so: one = one"]
