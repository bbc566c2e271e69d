"""Time of one call in the state a busy device is in: warm, at its power limit, with inputs that the cache does not hold.

A model alternates large matrix products and attention for seconds, so what counts is the sustained clock and not the boost of the first
milliseconds. Every case is therefore run for a while before it is timed. Short calls are captured several times in one CUDA graph, since
a graph that holds a single call adds its own launch to it, and take turns over several inputs.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil
from time import perf_counter
from typing import Any

import torch

from sparsesearch.kernels.device_clock import hz_between, stamp

GRAPH_S = 1e-3  # calls that a graph holds take at least this long together
MOST_CALLS = 48
LONG_S = 0.3  # a call that takes longer has warmed the device by itself
EARLY_GRAPHS = 3
"""What is timed is what a process meets that has captured more graphs than these. On an H200 (driver 580.159, CUDA 13.0) a plain step of the
Llama-3-8B shape, 1556 kernels, takes 6.57 ms until the fourth capture of a process and 7.16 ms from then on, in the graphs captured before
too: 0.45 us pass from kernel to kernel in place of 0.1 us. Captures count, however small and whether they are instantiated or not; instantiating
one again, launches and freed memory do not. So a step captured several times to keep the fastest would be the slower one. With a vocabulary
of 1024, whose weights lie elsewhere, it stays at the lower time; fused and compiled steps do not differ."""
COMPILED = 1.1  # a first call that took so much longer than the second one has compiled or allocated something


@dataclass(frozen=True)
class Timed:
    """What was measured.

    Attributes:
        seconds: median time of one call.
        spread: interquartile range over the median.
        hz: clock of a GPU's multiprocessors meanwhile; None on a CPU.
    """

    seconds: float
    spread: float
    hz: float | None = None


def sustained(
    run: Callable[[int], object],
    *,
    device: str,
    copies: int = 1,
    warm_s: float = 0.12,
    measure_s: float = 0.08,
    graph: bool = True,
) -> Timed:
    """Time `run(copy)` on a device.

    Args:
        run: launches the work on the inputs of the given number; must be safe to capture if `graph`.
        device: `cuda`, or `cpu` for tests.
        copies: how many inputs there are.
        warm_s: time to run before measuring, in seconds.
        measure_s: time to measure, in seconds; at least three samples are taken.
        graph: capture the calls in a CUDA graph; otherwise the host's share counts where it is the longer one.
    """
    if torch.device(device).type != "cuda":
        return _on_host(run, copies, measure_s)
    (first,) = event_times(lambda: run(0), 1)  # compiles, perhaps
    before = stamp()
    (once,) = event_times(lambda: run(0), 1)
    if once > LONG_S:
        compiled = first > COMPILED * once
        samples = [once, *(event_times(lambda: run(0), 1) if compiled else [first])]
        return timed_of(samples, hz_between(before, stamp()))
    calls = min(MOST_CALLS, max(1, ceil(GRAPH_S / once)))
    calls = ceil(calls / copies) * copies if calls > 1 else 1
    replay = repeated(run, calls, copies=copies, graph=graph)
    (first,) = event_times(replay, 1)
    for _ in range(ceil(warm_s / first)):
        replay()
    before = stamp()
    samples = event_times(replay, max(3, ceil(measure_s / first)))
    return timed_of([sample / calls for sample in samples], hz_between(before, stamp()))


def repeated(run: Callable[[int], object], calls: int, *, copies: int = 1, graph: bool = True) -> Callable[[], object]:
    """So many calls that take turns over the copies, as one call: captured in a CUDA graph, or launched anew each time."""

    def launch() -> None:
        for call in range(calls):
            run(call % copies)

    if not graph:
        return launch
    _capture_early_graphs()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        launch()
    return _Captured(captured, launch)


@cache
def _capture_early_graphs() -> None:
    """See EARLY_GRAPHS; once a process."""
    counter = torch.zeros(1, device="cuda")
    counter.add_(1)
    for _ in range(EARLY_GRAPHS):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            counter.add_(1)


@dataclass(frozen=True)
class _Captured:
    """A graph, and the calls it was made from: they hold the tensors that it reads, which would be freed with them."""

    graph: torch.cuda.CUDAGraph
    calls: Callable[[], object]

    def __call__(self) -> None:
        self.graph.replay()


def event_times(replay: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each replay between two events on the current stream."""
    event: Any = torch.cuda.Event
    events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _on_host(run: Callable[[int], object], copies: int, measure_s: float) -> Timed:
    samples: list[float] = []
    begin = perf_counter()
    while len(samples) < 3 or perf_counter() - begin < measure_s:
        start = perf_counter()
        run(len(samples) % copies)
        samples.append(perf_counter() - start)
    return timed_of(samples)


def timed_of(samples: list[float], hz: float | None = None) -> Timed:
    """Median and spread of at least two samples, and the clock that they met."""
    middle = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4)
    return Timed(middle, (high - low) / middle, hz)
