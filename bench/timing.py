"""How long a call takes: on the GPU by replaying CUDA graphs, on the host by issuing it, without a GPU by the clock."""

import collections
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch

REPLAYS = 30
GRAPH_MS = 2.0  # calls in a graph: so many that its own launch does not count
MAX_CALLS = 500
WARM_UPS = 10  # replays before: an idle GPU needs a while to raise its clocks
REST = 2.0  # times as long as the replay before it: a third of the load's power is far below any limit on it
LONGEST_REST_S = 0.05  # behind replays above 25 ms: those of 60 or more meet the power limit by themselves
SUSTAINED_S = 0.5  # without a rest: a GPU at its power limit has settled at a lower clock by then

Seen = TypeVar("Seen")


class Timing(NamedTuple):
    """Microseconds per call over the replays."""

    median: float
    p10: float
    p90: float


class Graph:
    """`calls` captured one behind the other, over and over until the graph takes GRAPH_MS or longer.

    The results of every call stay alive, each in memory of its own: no call finds the last one's results in the cache.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], keep_results: bool = True) -> None:
        rounds = self._rounds(calls)
        self.results: list[Any] = []
        self.length = rounds * len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(rounds):
                for call in calls:
                    result = call()
                    if keep_results:
                        self.results.append(result)

    @staticmethod
    def _rounds(calls: Sequence[Callable[[], Any]]) -> int:
        """How many times around; the calls also run here for the first time, which compiles and loads kernels."""
        for call in calls:
            call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        needed = GRAPH_MS / max(start.elapsed_time(end), 1e-3)
        return max(1, min(round(needed + 0.5), MAX_CALLS // len(calls)))

    def replay(self) -> None:
        self._graph.replay()

    def time(self) -> Timing:
        return summary(self.samples())

    def samples(self) -> list[float]:
        """Microseconds per call of each replay, at the boost clock: the GPU rests after each."""
        return [self._burst() for _ in range(WARM_UPS + REPLAYS)][WARM_UPS:]

    def _burst(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.replay()
        end.record()
        end.synchronize()
        milliseconds = start.elapsed_time(end)
        time.sleep(min(REST * milliseconds / 1000, LONGEST_REST_S))
        return milliseconds * 1000 / self.length

    def sustained(self, watch: Callable[[], Seen]) -> tuple[float, Seen]:
        """Microseconds per call after SUSTAINED_S of load, the median of the last replays, and what `watch` saw then.

        The load goes on until `watch` has returned.
        """
        ends: collections.deque[torch.cuda.Event] = collections.deque(maxlen=REPLAYS + 1)

        def replay() -> None:
            self.replay()
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
            if len(ends) > 2:
                ends[-3].synchronize()  # two are queued: the GPU never waits, and the load ends soon after the last

        end_of_load = time.perf_counter() + SUSTAINED_S
        while time.perf_counter() < end_of_load:
            replay()
        with ThreadPoolExecutor(1) as pool:
            seen = pool.submit(watch)
            while not seen.done():
                replay()
        ends[-1].synchronize()
        milliseconds = statistics.median(start.elapsed_time(end) for start, end in itertools.pairwise(ends))
        return milliseconds * 1000 / self.length, seen.result()


def summary(microseconds: Sequence[float]) -> Timing:
    ordered = sorted(microseconds)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def host_us(call: Callable[[], Any], calls: int = 50, repeats: int = 7) -> float:
    """To issue one eager call; the queue is empty at the start and never full."""
    per_call = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        per_call.append((time.perf_counter() - start) * 1e6 / calls)
    torch.cuda.synchronize()
    return statistics.median(per_call)


def wall_us(call: Callable[[], Any]) -> Timing:
    """By the clock, for calls that return when they are done."""
    return summary(wall_samples(call))


def wall_samples(call: Callable[[], Any], repeats: int = 7) -> list[float]:
    call()
    per_call = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        per_call.append((time.perf_counter() - start) * 1e6)
    return per_call


class Clock:
    """Whole calls, each from an idle GPU to an idle GPU: `gpu`, by its events, and `host`, by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.gpu: list[float] = []  # stays empty without a GPU
        self.host: list[float] = []
        self._on_gpu = device.type == "cuda"

    def time(self, call: Callable[[], Any]) -> None:
        if not self._on_gpu:
            start_s = time.perf_counter()
            call()
            self.host.append((time.perf_counter() - start_s) * 1e6)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        self.host.append((time.perf_counter() - start_s) * 1e6)
        self.gpu.append(start.elapsed_time(end) * 1000)
