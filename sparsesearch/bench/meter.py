"""Time and memory of a device, or of the CPU where tests run."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

Stamps = list[tuple[Any, Any]]


@contextmanager
def timed(stamps: Stamps, device: torch.device) -> Iterator[None]:
    """Note when the block starts and ends on the device; nothing waits."""
    first = _stamp(device)
    yield
    stamps.append((first, _stamp(device)))


def _stamp(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_s(stamps: Stamps) -> float:
    """Sum of the times between the pairs; waits for the device."""
    if any(isinstance(first, float) for first, _ in stamps):
        return float(sum(end - first for first, end in stamps))
    torch.cuda.synchronize()
    return float(sum(first.elapsed_time(end) for first, end in stamps)) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def emptied(device: torch.device) -> None:
    """Give cached memory back, and forget the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes allocated since `emptied`; 0 on a CPU, where nobody counts."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def allocated_bytes(device: torch.device) -> int:
    """Bytes that are allocated now; 0 on a CPU."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
