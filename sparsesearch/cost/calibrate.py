"""Measuring a device: `sparsesearch calibrate`. A CPU by `cpu_cases` and `cpu_fit`, an accelerator by `device.runs` and `device.fit`."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from sparsesearch.artifacts import canonical_json, write_bytes
from sparsesearch.cost.cpu_cases import FULL, QUICK, all_cases, measure
from sparsesearch.cost.cpu_fit import fitted
from sparsesearch.cost.cpu_layers import layer_cases
from sparsesearch.cost.table import TableCostModel
from sparsesearch.errors import SpecError
from sparsesearch.kernels.dispatch import Backend

if TYPE_CHECKING:
    from sparsesearch.cost.device.micro_bench import Bench, Row
    from sparsesearch.cost.device.model import DeviceCostModel
    from sparsesearch.cost.device.run_plan import RunPlan

TIME_LIMIT_S = 70.0

Progress = Callable[[str, int, int], None]


def calibrate(
    device: str = "cpu",
    *,
    out: Path | None = None,
    quick: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    runs_out: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> "TableCostModel | DeviceCostModel":
    """Measure what attention costs here, and on an accelerator what a whole layer costs; in about 90 s.

    Args:
        device: `cpu` or `cuda`.
        out: where to write the JSON; None writes nothing.
        quick: a few shapes and seconds, for tests; extrapolates further.
        dtype: of queries, keys and values; by default fp32 on a CPU and bf16 elsewhere.
        seed: of the inputs and masks.
        runs_out: where to write an accelerator's micro-runs, from which the fit can be repeated; None writes nothing.
        progress: called with the stage, the amount done and the amount planned.

    Raises:
        SpecError: the device cannot be calibrated.
    """
    match torch.device(device).type if device.startswith("cuda") else device:
        case "cpu":
            return _calibrate_cpu(out, quick, dtype or torch.float32, seed, progress)
        case "cuda" if torch.cuda.is_available():
            return calibrate_cuda(out, quick, dtype or torch.bfloat16, seed, runs_out, progress)
    raise SpecError(
        f"calibrate must be given a device of this machine, cpu or cuda, but got {device!r}"
        f"{'' if torch.cuda.is_available() else ' and torch finds no GPU here'}. For a GPU that nobody has measured use "
        "roofline:<gpu> as the cost model."
    )


def _calibrate_cpu(out: Path | None, quick: bool, dtype: torch.dtype, seed: int, progress: Progress) -> TableCostModel:
    shapes = QUICK if quick else FULL
    generator = torch.Generator().manual_seed(seed)
    cases = [*all_cases(shapes, generator), *layer_cases(shapes.layer_rows, generator)]
    rounds = measure(cases, 5.0 if quick else TIME_LIMIT_S, dtype, generator, progress)
    model = TableCostModel(fitted(cases, shapes, dtype, {"seed": seed, "quick": quick, "rounds": rounds}))
    if out is not None:
        model.table.save(out)
    return model


def calibrate_cuda(
    out: Path | None, quick: bool, dtype: torch.dtype, seed: int, runs_out: Path | None, progress: Progress
) -> "DeviceCostModel":
    """Run the micro-runs on the current CUDA device and fit them."""
    import triton

    from sparsesearch.cost.device import micro_bench, run_plan, runs
    from sparsesearch.cost.device.fit import fitted as fit
    from sparsesearch.cost.device.model import DeviceCostModel

    properties = torch.cuda.get_device_properties("cuda")
    kernel: Backend = "gluon" if properties.major == 9 else "triton"
    plan = run_plan.QUICK if quick else run_plan.FULL
    bench = micro_bench.Bench("cuda", kernel, dtype, time_share=plan.time_share, seed=seed)
    start = perf_counter()
    rows, group_s = measured_rows(bench, plan, runs_out, progress)
    provenance = {
        "seed": seed,
        "quick": quick,
        "dtype": str(dtype).removeprefix("torch."),
        "device": properties.name,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "clock": f"sustained: medians after {20 * plan.time_share:g} ms to {120 * plan.time_share:g} ms of the same work, all after {runs.WARM_S:g} s and whole "
        f"layers after {micro_bench.SETTLE_S:g} s of matrix products; random data; inputs rotate through the cache",
        "micro_runs": len(rows),
        "group_s": {group: round(seconds, 1) for group, seconds in group_s.items()},
        "micro_runs_s": round(perf_counter() - start, 1),
    }
    table = fit(
        rows,
        name=short_name(properties.name),
        device=properties.name,
        kernel=kernel,
        workers=bench.workers,
        memory_bytes=float(properties.total_memory),
        dtype_bytes=torch.finfo(dtype).bits // 8,
        provenance=provenance,
    )
    if (whole_s := since_start_s()) is not None:
        table = table.model_copy(update={"provenance": provenance | {"whole_s": round(whole_s, 1)}})
    if out is not None:
        table.save(out)
    return DeviceCostModel(table)


def since_start_s() -> float | None:
    """Seconds since this process began, imports included; None where /proc does not tell."""
    stat, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not stat.exists() or not uptime.exists():
        return None
    started = int(stat.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(uptime.read_text().split()[0]) - started


def measured_rows(
    bench: "Bench", plan: "RunPlan", runs_out: Path | None, progress: Progress
) -> "tuple[list[Row], dict[str, float]]":
    """The rows of all micro-runs, written whenever a group is complete, lest a run cut short lose them; and the seconds of each group."""
    from sparsesearch.cost.device import runs
    from sparsesearch.cost.device.compile_ahead import compile_ahead

    start, total = perf_counter(), plan.count
    rows: list[Row] = []
    progress("compile", 0, total)
    with bench.busy():
        compile_ahead(bench, plan)
    group_s, before = {"compile": perf_counter() - start}, perf_counter()

    def keep() -> None:
        if runs_out is not None:
            write_bytes(runs_out, canonical_json({"runs": rows}).encode())

    for row in runs.all_runs(bench, plan):
        if rows and row["group"] != rows[-1]["group"]:
            keep()
        rows.append(row)
        group_s[row["group"]] = group_s.get(row["group"], 0.0) + perf_counter() - before
        before = perf_counter()
        progress("calibrate", min(len(rows), total), total)
    keep()
    return rows, group_s


def short_name(product: str) -> str:
    """`NVIDIA H100 80GB HBM3` as `h100`: the first word with a digit."""
    words = [word for word in re.split(r"[\s_/-]+", product.lower()) if re.search(r"\d", word)]
    return words[0] if words else re.sub(r"\W+", "-", product.lower())
