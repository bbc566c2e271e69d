"""Time of a call on a device that may be cool, as kernels are compared (`cost.device.timing` has a busy one's), and the two ceilings."""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from sparsesearch.cost.device.timing import GRAPH_S, event_times, repeated
from sparsesearch.kernels.device_clock import Stamp, hz_between, stamp


def median_s(run: Callable[[], object], *, budget_s: float = 0.15, graph: bool = True) -> float:
    """Median time of one call.

    A graph is replayed between events, so launch gaps do not count; it holds as many calls as fill a millisecond, so the replay's own cost
    does not either. The number of replays fills `budget_s`, at least 5.

    Args:
        run: launches the work; must be safe to capture if `graph`.
        budget_s: device time to spend.
        graph: replay a captured graph; otherwise call `run` anew each time.
    """
    work = captured(run) if graph else Replay(_warmed(run), 1)
    first = event_times(work.replay, 2)
    return statistics.median(event_times(work.replay, _repeats(statistics.median(first), budget_s))) / work.calls


@dataclass(frozen=True)
class Replay:
    """Work that is launched again and again.

    Attributes:
        replay: launches it.
        calls: how many calls one launch holds.
    """

    replay: Callable[[], object]
    calls: int


def captured(run: Callable[[], object]) -> Replay:
    """A graph of as many calls as fill a millisecond.

    Args:
        run: launches the work; must be safe to capture.
    """
    run()  # compiles, perhaps
    torch.cuda.synchronize()
    (once,) = event_times(run, 1)
    if once < GRAPH_S:
        once = min(once, *event_times(run, 2))
    calls = min(20, max(1, round(GRAPH_S / max(once, 1e-6))))
    return Replay(repeated(lambda _: run(), calls), calls)


@dataclass(frozen=True)
class Turns:
    """What a work that took turns with others took.

    Attributes:
        seconds: median time of one call.
        hz: median clock of a GPU's multiprocessors while it ran; None without one.
    """

    seconds: float
    hz: float | None


def in_turns(*works: Replay, budget_s: float = 0.15, least: int = 5) -> tuple[Turns, ...]:
    """Time each work while they take turns, so that all meet the same clock.

    A card at its power limit changes its clock by a fifth with what ran before, and with it the quotient of times measured one after the
    other. Of more than two, every other turn runs backwards: what always followed cuDNN was 4 % faster than what always followed itself.

    Args:
        works: what takes turns.
        budget_s: device time to spend on all of them.
        least: turns that are taken at least.
    """
    once = sum(event_times(work.replay, 1)[0] for work in works)
    times: list[list[float]] = [[] for _ in works]
    clocks: list[list[tuple[Stamp, Stamp]]] = [[] for _ in works]
    for turn in range(_repeats(once, budget_s, least)):
        back = len(works) > 2 and turn % 2 == 1
        for place in reversed(range(len(works))) if back else range(len(works)):
            before = stamp()
            times[place] += event_times(works[place].replay, 1)
            clocks[place].append((before, stamp()))
    return tuple(
        Turns(statistics.median(own) / work.calls, _median_hz(stamps))
        for own, stamps, work in zip(times, clocks, works, strict=True)
    )


def in_turns_s(*works: Replay, budget_s: float = 0.15, least: int = 5) -> tuple[float, ...]:
    """The times alone."""
    return tuple(turns.seconds for turns in in_turns(*works, budget_s=budget_s, least=least))


def paired(run: Callable[[], object], other: Callable[[], object], *, budget_s: float = 0.15) -> tuple[Turns, Turns]:
    """Two calls that take turns; see `in_turns`."""
    own, others = in_turns(captured(run), captured(other), budget_s=budget_s)
    return own, others


def _median_hz(stamps: Sequence[tuple[Stamp, Stamp]]) -> float | None:
    found = [hz for before, after in stamps if (hz := hz_between(before, after)) is not None]
    return statistics.median(found) if found else None


def _repeats(once_s: float, budget_s: float, least: int = 5) -> int:
    return min(200, max(least, int(budget_s / max(once_s, 1e-7))))


def _warmed(run: Callable[[], object]) -> Callable[[], object]:
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    return run


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
