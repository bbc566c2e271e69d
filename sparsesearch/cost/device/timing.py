"""Time of one call in the state a busy device is in: warm, at its power limit, with inputs that the cache does not hold.

A model alternates large matrix products and attention for seconds, so what counts is the sustained clock and not the boost of the first
milliseconds. Every case is therefore run for a while before it is timed. Short calls are captured several times in one CUDA graph, since
a graph that holds a single call adds its own launch to it, and take turns over several inputs.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Any

import torch

GRAPH_S = 1e-3  # calls that a graph holds take at least this long together
MOST_CALLS = 48
LONG_S = 0.3  # a call that takes longer has warmed the device by itself


@dataclass(frozen=True)
class Timed:
    """What was measured.

    Attributes:
        seconds: median time of one call.
        spread: interquartile range over the median.
    """

    seconds: float
    spread: float


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
    run(0)  # compiles
    torch.cuda.synchronize()
    (once,) = event_times(lambda: run(0), 1)
    if once > LONG_S:
        return _timed([once, *event_times(lambda: run(0), 1)])
    calls = min(MOST_CALLS, max(1, ceil(GRAPH_S / once)))
    calls = ceil(calls / copies) * copies if calls > 1 else 1
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for call in range(calls):
                run(call % copies)
        replay: Callable[[], object] = captured.replay
    else:

        def replay() -> None:
            for call in range(calls):
                run(call % copies)

    (first,) = event_times(replay, 1)
    for _ in range(ceil(warm_s / first)):
        replay()
    samples = event_times(replay, max(3, ceil(measure_s / first)))
    return _timed([sample / calls for sample in samples])


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
    return _timed(samples)


def _timed(samples: list[float]) -> Timed:
    middle = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4)
    return Timed(middle, (high - low) / middle)
