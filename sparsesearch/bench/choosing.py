"""What a dynamic rule's choice takes on this device, as the runtime makes it: tiles chosen by its kernels, and the schedule built from them.

    python -m sparsesearch.bench.choosing --json rows.json --update cost_models/h200.json

Many small launches at the host's pace would be a measurement of the host, so what a graph can hold is timed inside one.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from sparsesearch.cost.device.compile_ahead import choices, run_all
from sparsesearch.cost.device.fit import fit_estimators
from sparsesearch.cost.device.micro_bench import Bench, CompilingBench, Row
from sparsesearch.cost.device.run_plan import estimators
from sparsesearch.cost.device.runs import choosing_runs
from sparsesearch.cost.device.table import DeviceTable
from sparsesearch.kernels.dispatch import Backend


def measured(bench: Bench, tokens: list[int], kinds: list[str]) -> Iterator[Row]:
    """The rows of `choosing_runs`, as a calibration measures them."""
    if torch.device(bench.device).type == "cuda":
        run_all(bench.device, choices(CompilingBench(bench), tokens, kinds))
    yield from choosing_runs(bench, tokens, kinds)


def updated(table: DeviceTable, rows: list[Row]) -> DeviceTable:
    """The cost model with these rules' choices priced anew, which its provenance says."""
    fresh = {cost.kind: cost for cost in fit_estimators(rows)}
    kept = tuple(cost for cost in table.estimators if cost.kind not in fresh)
    estimators = tuple(sorted((*kept, *fresh.values()), key=lambda cost: cost.kind))
    provenance = table.provenance | {"choosing": f"measured apart: {', '.join(sorted(fresh))}"}
    return table.model_copy(update={"estimators": estimators, "provenance": provenance})


def main() -> None:
    """Command line: a table on stderr, rows in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the rows")
    parser.add_argument("--rows", type=Path, help="rows of an earlier run instead of a measurement")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--kinds", nargs="+", default=sorted(estimators()))
    parser.add_argument("--backend", default="gluon", help="tile kernel whose schedule is built")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--update", type=Path, help="cost model to write the new prices into")
    given = parser.parse_args()
    if given.rows is None:
        backend: Backend = given.backend
        bench = Bench(given.device, backend, torch.float32 if given.device == "cpu" else torch.bfloat16)
        found = measured(bench, given.tokens, given.kinds)
    else:
        found = iter(json.loads(given.rows.read_text()))
    rows: list[Row] = []
    for row in found:
        rows.append(row)
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
        sys.stderr.write(_line(row) + "\n")
    if given.update is not None:
        updated(DeviceTable.load(given.update), [row for row in rows if row["group"] == "estimator"]).save(given.update)


def _line(row: Row) -> str:
    what = f"{row['name']:15} {row['tokens']:6} tokens"
    if row["group"] == "skipped":
        return f"{what} skipped: {row['error']}"
    return f"{what} {row['heads']:3} heads {1e6 * row['seconds']:9.1f} us"


if __name__ == "__main__":
    main()
