"""What a dynamic rule's choice takes on this device, as the runtime makes it: tiles chosen by its kernels, and the schedule built from them.

    python -m sparsesearch.bench.choosing --json rows.json --update cost_models/h200.json

Many small launches at the host's pace would be a measurement of the host, so what a graph can hold is timed inside one.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from sparsesearch.cost.device.fit import fit_estimators
from sparsesearch.cost.device.micro_bench import Bench, Row
from sparsesearch.cost.device.run_plan import HAVE_KERNELS, MANY_HEADS, estimators
from sparsesearch.cost.device.runs import estimator_runs
from sparsesearch.cost.device.table import DeviceTable
from sparsesearch.kernels.dispatch import Backend


def measured(bench: Bench, tokens: list[int], kinds: list[str]) -> list[Row]:
    """The rows of `estimator_runs`: every rule for few heads, and those with kernels also for many."""
    found = list(estimator_runs(bench, tokens, kinds))
    several = [kind for kind in kinds if kind in HAVE_KERNELS]
    return found + (list(estimator_runs(bench, tokens, several, heads=MANY_HEADS)) if several else [])


def updated(table: DeviceTable, rows: list[Row]) -> DeviceTable:
    """The cost model with these rules' choices priced anew."""
    fresh = {cost.kind: cost for cost in fit_estimators(rows)}
    kept = tuple(cost for cost in table.estimators if cost.kind not in fresh)
    estimators = tuple(sorted((*kept, *fresh.values()), key=lambda cost: cost.kind))
    return table.model_copy(update={"estimators": estimators})


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
    backend: Backend = given.backend
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    if given.rows is None:
        rows = measured(Bench(given.device, backend, dtype), given.tokens, given.kinds)
    else:
        rows = json.loads(given.rows.read_text())
    given.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        if row["group"] == "estimator":
            line = f"{row['name']:15} {row['tokens']:6} tokens {row['heads']:3} heads {1e6 * row['seconds']:9.1f} us"
            sys.stderr.write(line + "\n")
    if given.update is not None:
        updated(DeviceTable.load(given.update), [row for row in rows if row["group"] == "estimator"]).save(given.update)


if __name__ == "__main__":
    main()
