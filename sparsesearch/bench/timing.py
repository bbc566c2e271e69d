"""Time of a call on a device that may be cool, as kernels are compared (`cost.device.timing` has a busy one's), and the two ceilings."""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

from sparsesearch.cost.device.timing import GRAPH_S, event_times, repeated


def median_s(run: Callable[[], object], *, budget_s: float = 0.15, graph: bool = True) -> float:
    """Median time of one call.

    A graph is replayed between events, so launch gaps do not count; it holds as many calls as fill a millisecond, so the replay's own cost
    does not either. The number of replays fills `budget_s`, at least 5.

    Args:
        run: launches the work; must be safe to capture if `graph`.
        budget_s: device time to spend.
        graph: replay a captured graph; otherwise call `run` anew each time.
    """
    replay, calls = _captured(run) if graph else _warmed(run)
    first = event_times(replay, 2)
    repeats = min(200, max(5, int(budget_s / max(statistics.median(first), 1e-7))))
    return statistics.median(event_times(replay, repeats)) / calls


def paired_s(run: Callable[[], object], other: Callable[[], object], *, budget_s: float = 0.15) -> tuple[float, float]:
    """Median times of two calls that take turns, so that both meet the same clock.

    A card at its power limit changes its clock by a fifth with what ran before, and with it the quotient of times measured one after the
    other. Both are replayed as graphs, as in `median_s`, at least 5 times each.

    Args:
        run: launches the first work; must be safe to capture.
        other: launches the second.
        budget_s: device time to spend on both.
    """
    (replay, calls), (other_replay, other_calls) = _captured(run), _captured(other)
    both = sum(statistics.median(event_times(one, 2)) for one in (replay, other_replay))
    turns = [
        (*event_times(replay, 1), *event_times(other_replay, 1))
        for _ in range(min(200, max(5, int(budget_s / max(both, 1e-7)))))
    ]
    own, others = zip(*turns, strict=True)
    return statistics.median(own) / calls, statistics.median(others) / other_calls


def _warmed(run: Callable[[], object]) -> tuple[Callable[[], object], int]:
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    return run, 1


def _captured(run: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """A graph of as many calls as fill a millisecond, and how many."""
    _warmed(run)
    calls = min(20, max(1, round(GRAPH_S / max(min(event_times(run, 3)), 1e-6))))
    return repeated(lambda _: run(), calls), calls


def ceilings() -> dict[str, float]:
    """Rates this device reaches now, on random data: bf16 matrix product, and device copy counting bytes read and written."""
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    out = torch.empty_like(a)
    matmul_s = median_s(lambda: torch.matmul(a, b, out=out), budget_s=0.3)
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy_s = median_s(
        lambda: target.copy_(source), budget_s=0.1, graph=False
    )  # a graph's copy node is slower than a copy kernel
    return {"matmul_flop_per_s": 2 * size**3 / matmul_s, "copy_bytes_per_s": 2 * source.nbytes / copy_s}


def provenance(command: list[str] | None = None) -> dict[str, Any]:
    """Device, versions and command line."""
    device = torch.cuda.get_device_properties(0)
    cudnn: Any = torch.backends.cudnn
    return {
        "device": device.name,
        "num_sms": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "triton": triton.__version__,
        "command": " ".join(command if command is not None else sys.argv),
    }
