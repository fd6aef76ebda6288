"""The two clocks, on a GPU made of a few lines: it lowers its own where the load of the last 60 ms is above a half."""

import time
import types

import pytest
import torch

from hybrid_ops.bench import conv1d, harness, machine, timing

WINDOW_MS = 60.0
BOOST_MHZ, LIMITED_MHZ = 1980, 1515
CLOCKS_UP_MS = 4.0  # of work, until an idle GPU runs at its boost clock
CALLS = 16


class Gpu:
    """Its queue and the host's clock, in milliseconds; `work_ms` is a replay's time at the boost clock."""

    def __init__(self, work_ms=2.0):
        self.work_ms, self.now, self.busy_until, self.worked, self.replays = work_ms, 0.0, 0.0, [], 0

    def mhz(self, at):
        if at < CLOCKS_UP_MS:
            return 345
        load = sum(max(0.0, min(end, at) - max(start, at - WINDOW_MS)) for start, end in self.worked)
        return LIMITED_MHZ if load > WINDOW_MS / 2 else BOOST_MHZ

    def replay(self):
        start = max(self.now, self.busy_until)
        self.busy_until = start + self.work_ms * BOOST_MHZ / self.mhz(start)
        self.worked = [*self.worked[-100:], (start, self.busy_until)]
        self.now += 0.01  # to launch it
        self.replays += 1

    def sleep(self, seconds):
        self.now += 1000 * seconds

    def event(self, enable_timing):
        event = types.SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.now, self.busy_until))
        event.synchronize = lambda: setattr(self, "now", max(self.now, event.at))
        event.elapsed_time = lambda end: end.at - event.at
        return event


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    clock = types.SimpleNamespace(perf_counter=lambda: gpu.now / 1000, sleep=gpu.sleep)
    monkeypatch.setattr(timing, "time", clock)
    return gpu


def graph_on(gpu):
    graph = timing.Graph.__new__(timing.Graph)  # without CUDA there is no capture
    graph.length, graph.replay = CALLS, gpu.replay
    return graph


def us_at(mhz):
    return pytest.approx(2000 / CALLS * BOOST_MHZ / mhz)


def test_bursts_keep_the_boost_clock(gpu):
    samples = graph_on(gpu).samples()
    assert len(samples) == timing.REPLAYS
    assert all(us == us_at(BOOST_MHZ) for us in samples)
    assert 200 <= gpu.now <= 300  # milliseconds for a figure


def test_no_rest_is_much_longer_than_the_window_of_the_limit(gpu):
    gpu.work_ms = 400.0
    graph_on(gpu).samples()
    replays = timing.WARM_UPS + timing.REPLAYS
    assert gpu.now - sum(end - start for start, end in gpu.worked) <= replays * WINDOW_MS


def test_sustained_is_timed_while_its_clock_is_asked_for(gpu):
    def watch():
        """Sees the GPU still at work, as nvidia-smi must, which takes its time."""
        before, patience = gpu.replays, time.monotonic() + 10
        while gpu.replays < before + 50:
            assert time.monotonic() < patience, "the load has ended"
            time.sleep(0.001)
        return gpu.mhz(gpu.now)

    graph = graph_on(gpu)
    assert graph.sustained(watch) == (us_at(LIMITED_MHZ), LIMITED_MHZ)
    assert all(start == end for (_, end), (start, _) in zip(gpu.worked, gpu.worked[1:], strict=False))  # no rests
    assert gpu.now >= 1000 * timing.SUSTAINED_S


def test_sustained_without_an_answer(gpu):
    assert graph_on(gpu).sustained(lambda: None) == (us_at(LIMITED_MHZ), None)
    assert gpu.now <= 700  # milliseconds for a row


@pytest.mark.parametrize(
    ("answer", "mhz"), [({"clocks.sm": "1515 MHz"}, 1515), ({"clocks.sm": "[N/A]"}, None), ({}, None)]
)
def test_the_clock_of_now(answer, mhz, monkeypatch):
    monkeypatch.setattr(machine, "_nvidia_smi", lambda device, *fields: answer)
    assert machine.sm_mhz(torch.device("cuda")) == mhz


class Replayed:
    """A Graph whose replays are calls, and whose times are given."""

    def __init__(self, calls, keep_results=True):
        self.calls, self.results = calls, [call() for call in calls]

    def replay(self):
        for call, results in zip(self.calls, self.results, strict=True):
            for name, result in call().items():
                results[name].copy_(result)

    def samples(self):
        self.replay()
        return [127.0, 126.0, 128.0]

    def time(self):
        return timing.summary(self.samples())

    def sustained(self, watch):
        self.replay()
        return 140.0, watch()


@pytest.mark.parametrize("mhz", [1515, None])
def test_a_row_has_both_figures(mhz, monkeypatch):
    monkeypatch.setattr(harness, "Graph", Replayed)
    monkeypatch.setattr(harness, "host_us", lambda call: 50.0)
    monkeypatch.setattr(harness, "sm_mhz", lambda device: mhz)
    case, row = conv1d.conv1d("tiny", 64, 1), {}
    sets = harness.input_sets(case, torch.device("cpu"))
    assert harness.measure(case, "torch", sets, row, torch.device("cuda")) == [127.0, 126.0, 128.0]
    assert row["check"] == "passed"
    assert (row["gpu_us"], row["gpu_us_sustained"], row["sm_mhz_sustained"]) == (127.0, 140.0, mhz)
