"""How well a cost model predicts this device: held-out heterogeneous layers, and whole models with random weights.

    python -m sparsesearch.bench.cost --json out.json [--cost-model h200] [--parts layers,decode] [--rows earlier.json ...]

Without --cost-model the device is calibrated first; the model and its micro-runs are written beside the record. With --rows nothing is
measured: another cost model predicts earlier records' rows, whose provenance stays. Rows are written as they come, so that what an
interrupted run has measured can be judged with --rows.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sparsesearch.artifacts import write_bytes
from sparsesearch.bench.cost_errors import model_summary, plan_summary
from sparsesearch.bench.cost_plans import HeldOutPlan, held_out_plans
from sparsesearch.bench.cost_runs import DENSE_SEED, decode_runs, fused_runs, plan_runs, prefill_runs
from sparsesearch.bench.timing import provenance
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.calibrate import calibrate
from sparsesearch.cost.device.llama import RandomLlama
from sparsesearch.cost.device.micro_bench import Bench, Row
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.errors import SpecError, nearest
from sparsesearch.model_shapes import ModelShape, model_shape

FORMAT = "sparsesearch.bench.cost"
PREFILLS = ((8192, DENSE_SEED), (8192, 0), (32768, DENSE_SEED), (32768, 0))
LONG_PREFILLS = ((131072, 0), (65536, 0))
"""Last of all, since they take as long as all others."""
DECODES = ((1, 8192), (1, 131072), (4, 16384), (8, 8192), (16, 4096), (32, 8192), (32, 1024))
FUSED = ((1, 8192), (1, 32768), (4, 16384), (8, 8192), (16, 4096))
PARTS = ("decode", "fused", "layers", "prefill")
GROUPS = {
    "decode_step": "decode",
    "fused_step": "fused",
    "plan": "layers",
    "repeat": "layers",
    "prefill": "prefill",
}
"""Groups of rows, and the part that measures them."""
SETTLE_S = 3.0
"""Large products before the first row: the device may have been idle, which a calibration's rows have not met."""
REPEATED = 6  # of the long plans every so many one is measured twice, for the noise
SHORT_S = 1e-3
"""Plans shorter than this are measured in three rounds: two of 0.1 ms each differ by up to 8 % between two runs, as the clock happens to be."""


def measured(bench: Bench, *, model: str | None, parts: Sequence[str] = PARTS, per_shape: int = 5) -> Iterator[Row]:
    """All rows of the parts, each with the second at which it was there: plans, some of them again; the model's steps and prefills."""
    begin = perf_counter()
    for row in _rows(bench, None if model is None else model_shape(model), parts, per_shape):
        yield row | {"at_s": round(perf_counter() - begin, 2)}


def _rows(bench: Bench, shape: ModelShape | None, parts: Sequence[str], per_shape: int) -> Iterator[Row]:
    bench.settle(SETTLE_S)
    if shape is not None and "fused" in parts:
        yield from fused_runs(bench, shape, FUSED)
    if "layers" in parts:
        yield from _layers(bench, list(held_out_plans(per_shape=per_shape)))
    if shape is not None and {"decode", "prefill"} & set(parts):
        model = RandomLlama(shape, bench)
        yield from prefill_runs(model, PREFILLS if "prefill" in parts else ())
        if "decode" in parts:
            bench.rest()
            yield from decode_runs(model, DECODES)
        yield from prefill_runs(model, LONG_PREFILLS if "prefill" in parts else ())


def _layers(bench: Bench, plans: Sequence[HeldOutPlan]) -> Iterator[Row]:
    """Of the short plans, the middle one of three rounds, and their first again; of the long ones, some again."""
    first = dict(zip(plans, plan_runs(bench, plans), strict=True))
    short = [plan for plan in plans if first[plan]["seconds"] < SHORT_S]
    rounds = {plan: [row] for plan, row in first.items()}
    for order in (short[::-1], short):
        for plan, row in zip(order, plan_runs(bench, order), strict=True):
            rounds[plan].append(row)
    for own in rounds.values():
        yield sorted(own, key=lambda row: float(row["seconds"]))[len(own) // 2] | {"rounds": len(own)}
        if len(own) > 1:
            yield own[0] | {"group": "repeat"}
    for row in plan_runs(bench, [plan for plan in plans if plan not in short][::REPEATED]):
        yield row | {"group": "repeat"}


def parts_of(text: str) -> tuple[str, ...]:
    """The named parts.

    Raises:
        SpecError: one is unknown.
    """
    parts = tuple(dict.fromkeys(text.split(",")))
    for part in parts:
        if part not in PARTS:
            raise SpecError(f"--parts must name some of {', '.join(PARTS)}, but got {part!r}.{nearest(part, PARTS)}")
    return parts


def record(rows: Sequence[Row], model: DeviceCostModel, command: list[str] | None = None) -> dict[str, Any]:
    """The rows, and what each way of predicting makes of them."""
    return {
        "format": FORMAT,
        "cost_model": model.name,
        "provenance": provenance(command or [_command()]),
        "rows": list(rows),
        "plans": plan_summary(rows, model),
        "models": model_summary(rows, model),
    }


def joined(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of several: of a part that more than one has measured, the last one's rows; each part keeps its provenance."""
    rows: dict[str, list[Row]] = {}
    provenance: dict[str, Any] = {}
    for one in records:
        parts = {part: [row for row in one["rows"] if GROUPS[row["group"]] == part] for part in PARTS}
        for part, own in parts.items():
            if own:
                rows[part], provenance[part] = own, one["provenance"].get(part, one["provenance"])
    return {"format": FORMAT, "rows": [row for part in PARTS for row in rows.get(part, ())], "provenance": provenance}


def judged_again(earlier: Sequence[Path], model: DeviceCostModel) -> dict[str, Any]:
    """Earlier records' rows with another model's predictions; who measured them and how stays."""
    found = joined([json.loads(path.read_text(encoding="utf-8")) for path in earlier])
    rows = found["rows"]
    judged = {"cost_model": model.name, "plans": plan_summary(rows, model), "models": model_summary(rows, model)}
    return found | judged | {"provenance": found["provenance"] | {"predictions": _command()}}


def main() -> None:
    """Command line: a line of JSON per row on stderr, the whole record in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument("--cost-model", help="shipped name or file; calibrates first by default")
    parser.add_argument("--per-shape", type=int, default=5, help="held-out plans per length and head size")
    parser.add_argument("--model-shape", default="llama3-8b", help="model to run end to end; 'none' leaves it out")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which rows are measured: some of {', '.join(PARTS)}")
    parser.add_argument("--time-share", type=float, default=1.0, help="share of the usual time per row")
    parser.add_argument("--unjudged", action="store_true", help="measure rows alone, which --rows judges elsewhere")
    parser.add_argument(
        "--rows",
        type=Path,
        nargs="+",
        help="earlier records whose rows are predicted again; of a part that several hold, the last one's; needs --cost-model",
    )
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
        bench = Bench("cuda", model.kernel, torch.bfloat16, seed=1, time_share=given.time_share)
        shape = None if given.model_shape == "none" else given.model_shape
        rows: list[Row] = []
        for row in measured(bench, model=shape, parts=parts_of(given.parts), per_shape=given.per_shape):
            rows.append(row)
            sys.stderr.write(json.dumps(row) + "\n")
            _write(given.json, {"format": FORMAT, "provenance": provenance([_command()]), "rows": rows})
        if given.unjudged:
            return
        found = record(rows, model)
    _write(given.json, found)


def _command() -> str:
    return " ".join(["python -m sparsesearch.bench.cost", *sys.argv[1:]])


def _write(path: Path, content: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
