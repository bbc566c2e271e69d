"""What limits a prefill kernel: hardware counters, read by Nsight Compute (`ncu`) in a process of its own.

    python -m sparsesearch.bench.counters --json out.json

Each case is run in a loop first, where the card is as warm as in use: `loaded_hz` and `loaded_w` are its clock and power then (at 8k tokens the
host launches more slowly than the kernels run, and the card rests in between). Its counters are those of single launches afterwards, at the clock
`hz`. Shares are of cycles in which a multiprocessor was busy: `tensor` 1.0 means that the
matrix units never waited. A warp-specialised kernel has idle warps, which `stalls` (warps waiting, per instruction issued) counts at the barrier.
"""

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch

from sparsesearch.bench.attention import BLOCK_TOKENS, PLANS, PlanName, plan_rules
from sparsesearch.bench.timing import provenance
from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import UnsupportedKernelError
from sparsesearch.kernels.dispatch import run_schedule, schedule_for
from sparsesearch.kernels.schedule import Span

CASES: tuple[tuple[int, int, PlanName], ...] = (
    (128, 8192, "sparse"),
    (128, 32768, "mixed"),
    (64, 8192, "sparse"),
    (64, 32768, "mixed"),
)
KERNELS = "hopper_attention|cudnn"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = ("barrier", "dispatch_stall", "gmma", "long_scoreboard", "math_pipe_throttle", "mio_throttle", "no_instruction", "not_selected",
          "short_scoreboard", "wait")  # fmt: skip
Counters: TypeAlias = dict[str, tuple[str, float]]
"""Name of ours: name in `ncu`, and its unit in ours; names that begin with `stalls.` are put together."""
TIMES: Counters = {
    "seconds": ("gpu__time_duration.sum", 1e-9),
    "hz": ("gpc__cycles_elapsed.avg.per_second", 1.0),
    "elapsed_cycles": ("gpc__cycles_elapsed.max", 1.0),
    "busy_cycles_min": ("sm__cycles_active.min", 1.0),
    "busy_cycles_mean": ("sm__cycles_active.avg", 1.0),
    "busy_cycles_max": ("sm__cycles_active.max", 1.0),
}
"""Of any kernel: how long it took, and its multiprocessors' part of that."""
COUNTERS: Counters = (
    TIMES
    | {
        "tensor": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 0.01),
        "exp2": ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active", 0.01),
        "alu": ("sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_active", 0.01),
        "fma": ("sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active", 0.01),
        "issue": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 0.01),
        "l2": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 0.01),
        "dram": ("dram__cycles_active.avg.pct_of_peak_sustained_elapsed", 0.01),
    }
    | {f"stalls.{name}": (STALL.format(name), 1.0) for name in STALLS}
)


def run(cases: Sequence[tuple[int, int, PlanName]] = CASES, *, command: list[str] | None = None) -> dict[str, Any]:
    """Counters of our kernel and of dense cuDNN on each case (head_dim, length, plan): bf16, causal, 32 query and 8 KV heads.

    Raises:
        UnsupportedKernelError: there is no `ncu`, it may not read counters here, or nvidia-ml-py is missing.
    """
    if find_spec("pynvml") is None:
        raise UnsupportedKernelError(
            "clock and power are read through nvidia-ml-py, which is not installed: pip install 'sparsesearch[counters]'."
        )
    launched, counted = profile("sparsesearch.bench.counters", json.dumps(cases), KERNELS, COUNTERS)
    return {
        "format": "sparsesearch.bench.counters",
        "provenance": provenance(command),
        "rows": [row | counters for row, counters in zip(launched, counted, strict=True)],
    }


def profile(
    module: str, cases: str, kernels: str, counters: Counters
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run `python -m module --child cases` under `ncu`: what it prints in its last line, and the counters of every launch it profiles.

    Args:
        module: turns the profiler on (`cudaProfilerStart`) around what is to be counted.
        cases: passed to it.
        kernels: regular expression of the kernels' names.
        counters: what to count, and under which names.

    Raises:
        UnsupportedKernelError: there is no `ncu`, or it may not read counters here.
    """
    if shutil.which("ncu") is None:
        raise UnsupportedKernelError("counters need Nsight Compute: put `ncu` of the CUDA toolkit on PATH.")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.csv")
        metrics = ",".join(metric for metric, _ in counters.values())
        done = subprocess.run(
            ["ncu", "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off", "--page", "raw", "--csv",
             "--print-units", "base", "-k", f"regex:{kernels}", "--metrics", metrics, "--log-file", str(log),
             sys.executable, "-m", module, "--child", cases],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        text = log.read_text() if log.exists() else ""
    if done.returncode or '"ID"' not in text:
        raise UnsupportedKernelError(f"ncu read no counters: {(done.stderr + text)[-400:]}")
    return json.loads(done.stdout.splitlines()[-1]), parse(text, counters)


def parse(text: str, counters: Counters) -> list[dict[str, Any]]:
    """Rows of `ncu --page raw --csv --print-units base`, one per launch, in units of our names."""
    table = list(csv.DictReader(io.StringIO(text[text.index('"ID"') :])))
    rows: list[dict[str, Any]] = []
    for launch in table[1:]:  # the first holds units
        row: dict[str, Any] = {"stalls": {}}
        for name, (metric, unit) in counters.items():
            value = float(launch[metric].replace(",", "")) * unit
            if name.startswith("stalls."):
                row["stalls"][name.removeprefix("stalls.")] = value
            else:
                row[name] = value
        rows.append(row)
    return rows


def _launch(cases: Sequence[tuple[int, int, PlanName]]) -> list[dict[str, Any]]:
    """Run every case, first in a loop, then once with the profiler on; what was run, in order."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    rows = []
    for head_dim, length, plan in cases:
        shape = (1, 32, length, head_dim)
        q, k, v = (torch.randn(1, heads, *shape[2:], device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
        schedule = schedule_for(
            q, k, (Span(BlockGrid(length, length, BLOCK_TOKENS, causal=True)),), plan_rules(plan, 32, length), "gluon"
        )

        def ours() -> None:
            run_schedule(q, k, v, schedule, scale=head_dim**-0.5, kernel="gluon")  # noqa: B023

        def dense() -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: B023

        for name, density, attend in ((plan, schedule.density, ours), ("dense", 1.0, dense)):
            kernel = "gluon" if attend is ours else "cudnn"
            row: dict[str, Any] = {
                "head_dim": head_dim,
                "length": length,
                "plan": name,
                "kernel": kernel,
                "density": density,
            }
            rows.append(row | _loaded(attend))
            torch.cuda.cudart().cudaProfilerStart()
            attend()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
    return rows


def _loaded(attend: Callable[[], None], *, budget_s: float = 0.7) -> dict[str, float]:
    """Clock, power and time per call after the card has run the case for a while."""
    attend()
    torch.cuda.synchronize()
    start, calls = time.perf_counter(), 0
    hz, watts = [], []
    while time.perf_counter() - start < budget_s:
        for _ in range(20):
            attend()
        calls += 20
        hz.append(torch.cuda.clock_rate() * 1e6)
        watts.append(torch.cuda.power_draw() * 1e-3)
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / calls
    half = len(hz) // 2
    return {
        "loaded_s": seconds,
        "loaded_hz": sum(hz[half:]) / len(hz[half:]),
        "loaded_w": sum(watts[half:]) / len(watts[half:]),
    }


def _case(text: str) -> tuple[int, int, PlanName]:
    head_dim, length, plan = text.split(":")
    if plan not in PLANS:
        raise argparse.ArgumentTypeError(f"{plan!r} is no plan of {PLANS}")
    return int(head_dim), int(length), plan


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--cases", nargs="+", type=_case, default=CASES, help="head_dim:tokens:plan, each")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        sys.stdout.write(json.dumps(_launch(given.child)) + "\n")
        return
    if given.json is None:
        parser.error("--json is missing.")
    try:
        record = run(given.cases)
    except UnsupportedKernelError as error:
        parser.exit(1, f"{error}\n")
    given.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
