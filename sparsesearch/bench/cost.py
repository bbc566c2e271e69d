"""How well a cost model predicts this device: held-out heterogeneous layers, and whole models with random weights.

    python -m sparsesearch.bench.cost --json out.json [--cost-model h200] [--rows earlier.json]

Without --cost-model the device is calibrated first; the model and its micro-runs are written beside the record. With --rows nothing is
measured: another cost model predicts an earlier record's rows, whose provenance stays.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sparsesearch.bench.cost_errors import model_summary, plan_summary
from sparsesearch.bench.cost_plans import held_out_plans
from sparsesearch.bench.cost_runs import DENSE_SEED, model_runs, plan_runs
from sparsesearch.bench.timing import provenance
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.calibrate import calibrate
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.runs import Bench, Row
from sparsesearch.errors import SpecError
from sparsesearch.model_shapes import model_shape

FORMAT = "sparsesearch.bench.cost"
PREFILLS = ((8192, DENSE_SEED), (8192, 0), (32768, DENSE_SEED), (32768, 0), (65536, 0), (131072, 0))
DECODES = ((1, 8192), (1, 131072), (4, 16384), (8, 8192), (16, 4096), (32, 8192), (32, 1024))
REPEATED = 6  # of the long plans every so many one is measured twice, for the noise
SHORT_S = 1e-3
"""Plans shorter than this are measured in three rounds: two of 0.1 ms each differ by up to 8 % between two runs, as the clock happens to be."""


def measured(bench: Bench, *, model: str | None, per_shape: int = 5) -> list[Row]:
    """All rows: plans, some of them again, and the model's prefills and decoding steps."""
    begin, rows = perf_counter(), []
    plans = list(held_out_plans(per_shape=per_shape))

    def take(row: Row) -> None:
        rows.append(row | {"at_s": round(perf_counter() - begin, 2)})
        sys.stderr.write(json.dumps(rows[-1]) + "\n")

    first = list(plan_runs(bench, plans))
    short = [plan for plan, row in zip(plans, first, strict=True) if row["seconds"] < SHORT_S]
    again = {plan: [row] for plan, row in zip(plans, first, strict=True)}
    for order in (short[::-1], short):
        for plan, row in zip(order, plan_runs(bench, order), strict=True):
            again[plan].append(row)
    for own in again.values():
        take(sorted(own, key=lambda row: float(row["seconds"]))[len(own) // 2] | {"rounds": len(own)})
        if len(own) > 1:
            take(own[0] | {"group": "repeat"})
    long = [plan for plan in plans if plan not in short]
    for row in plan_runs(bench, long[::REPEATED]):
        take(row | {"group": "repeat"})
    if model is not None:
        for row in model_runs(bench, model_shape(model), PREFILLS, DECODES):
            take(row)
    return rows


def record(rows: Sequence[Row], model: DeviceCostModel, command: list[str] | None = None) -> dict[str, Any]:
    """The rows, and what each way of predicting makes of them."""
    return {
        "format": FORMAT,
        "cost_model": model.name,
        "provenance": provenance(command),
        "rows": list(rows),
        "plans": plan_summary(rows, model),
        "models": model_summary(rows, model),
    }


def judged_again(earlier: Path, model: DeviceCostModel) -> dict[str, Any]:
    """An earlier record's rows with another model's predictions; who measured them and how stays."""
    kept: dict[str, Any] = json.loads(earlier.read_text(encoding="utf-8"))
    rows = kept["rows"]
    judged = {"cost_model": model.name, "plans": plan_summary(rows, model), "models": model_summary(rows, model)}
    return kept | judged | {"provenance": kept["provenance"] | {"predictions": " ".join(sys.argv)}}


def main() -> None:
    """Command line: a line of JSON per row on stderr, the whole record in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument("--cost-model", help="shipped name or file; calibrates first by default")
    parser.add_argument("--per-shape", type=int, default=5, help="held-out plans per length and head size")
    parser.add_argument("--model-shape", default="llama3-8b", help="model to run end to end; 'none' leaves it out")
    parser.add_argument("--rows", type=Path, help="earlier record whose rows are predicted again; needs --cost-model")
    given = parser.parse_args()
    if given.rows is not None and given.cost_model is None:
        raise SpecError("--rows measures nothing, so the cost model must be known. Pass --cost-model.")
    if given.cost_model is None:
        beside, runs_beside = (given.json.with_suffix(suffix) for suffix in (".model.json", ".runs.json"))
        model: Any = calibrate("cuda", out=beside, runs_out=runs_beside)
    else:
        model = load_cost_model(given.cost_model)
    if not isinstance(model, DeviceCostModel):
        raise SpecError(f"--cost-model must be that of an accelerator, but {given.cost_model} is not.")
    if given.rows is not None:
        found = judged_again(given.rows, model)
    else:
        bench = Bench("cuda", model.kernel, torch.bfloat16, seed=1)
        end_to_end = None if given.model_shape == "none" else given.model_shape
        found = record(measured(bench, model=end_to_end, per_shape=given.per_shape), model)
    given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
