"""What limits the decode kernels: hardware counters, as `bench.counters` reads them for prefill.

    python -m sparsesearch.bench.decode_counters --json out.json

Two rows per case: the kernel that reads the keys and values, and the merge of its parts. Shares are of the whole launch. Nsight Compute lets one
kernel run at a time, and refuses those launched while another runs (programmatic dependent launch): here both are launched when the one before is
over, so what they do before that (`triton_decode`) shows as idle time at their beginning, and their sum is longer than a call of `bench.decode`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sparsesearch.bench.counters import STALL, TIMES, Counters, profile
from sparsesearch.bench.decode import lengths_of
from sparsesearch.bench.timing import provenance
from sparsesearch.errors import UnsupportedKernelError
from sparsesearch.kernels import triton_decode

Case = tuple[int, int, float]
"""Sequences, keys of each, share of them kept, in ragged heads."""
CASES: tuple[Case, ...] = ((1, 32768, 1.0), (8, 16384, 0.25), (16, 8192, 0.25), (8, 32768, 1.0))
KERNELS = "ragged_decode_parts|merge_decode_parts"
STALLS = (
    "barrier",
    "long_scoreboard",
    "math_pipe_throttle",
    "mio_throttle",
    "not_selected",
    "short_scoreboard",
    "wait",
)
ELAPSED = "{}.avg.pct_of_peak_sustained_elapsed"
COUNTERS: Counters = (
    TIMES
    | {
        "read_bytes": ("dram__bytes_read.sum", 1.0),
        "dram": (ELAPSED.format("dram__throughput"), 0.01),
        "l2": (ELAPSED.format("lts__throughput"), 0.01),
        "l2_hits": ("lts__t_sector_hit_rate.pct", 0.01),
        "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active", 0.01),
        "issue": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 0.01),
        "registers": ("launch__registers_per_thread", 1.0),
        "waves": ("launch__waves_per_multiprocessor", 1.0),
    }
    | {f"stalls.{name}": (STALL.format(name), 1.0) for name in STALLS}
)
KERNEL_NAMES: tuple[Literal["parts", "merge"], ...] = ("parts", "merge")


def run(cases: Sequence[Case] = CASES, *, command: list[str] | None = None) -> dict[str, Any]:
    """Counters of both kernels on each case: bf16, 32 query and 8 KV heads of 128.

    Raises:
        UnsupportedKernelError: there is no `ncu`, or it may not read counters here.
    """
    launched, counted = profile("sparsesearch.bench.decode_counters", json.dumps(cases), KERNELS, COUNTERS)
    each = [row | {"kernel": kernel} for row in launched for kernel in KERNEL_NAMES]
    return {
        "format": "sparsesearch.bench.decode_counters",
        "provenance": provenance(command),
        "rows": [row | counters for row, counters in zip(each, counted, strict=True)],
    }


def _launch(cases: Sequence[Case], num_heads: int = 32, num_kv_heads: int = 8, head_dim: int = 128) -> list[Any]:
    """Run every case, first some times, then once with the profiler on; what was run, in order."""
    rows = []
    for batch, length, kept in cases:
        starts = torch.arange(batch * num_kv_heads, device="cuda") * length
        lens = lengths_of("ragged", kept, batch, num_kv_heads, length)
        q = torch.randn(batch, num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
        k, v = q.new_empty(2, batch * num_kv_heads * length, head_dim).normal_()
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        workers = torch.cuda.get_device_properties(0).multi_processor_count * triton_decode.WORKERS_PER_SM

        def attend() -> None:
            triton_decode.launch(
                q, k, v, starts, lens, None, out, lse,  # noqa: B023
                scale=head_dim**-0.5, page_tokens=64, workers=workers, early=False,  # noqa: B023
            )  # fmt: skip

        num_bytes = int(lens.sum()) * head_dim * 4
        case = {"batch": batch, "length": length, "kept": kept, "bytes": num_bytes}
        rows.append(case)
        for _ in range(20):
            attend()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        attend()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        sys.stdout.write(json.dumps(_launch(given.child)) + "\n")
        return
    if given.json is None:
        parser.error("--json is missing.")
    try:
        record = run()
    except UnsupportedKernelError as error:
        parser.exit(1, f"{error}\n")
    given.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
