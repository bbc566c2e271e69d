"""Fit an accelerator's micro-runs again, without the device: after a change of the fit, or to see what a run is worth.

    python -m sparsesearch.cost.device.refit --runs h200.runs.json --model cost_models/h200.json --json cost_models/h200.json

The runs are those that `sparsesearch calibrate --device cuda --runs` wrote; device and provenance are taken from the model that it wrote.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sparsesearch.artifacts import read_text
from sparsesearch.cost.device.fit import fitted
from sparsesearch.cost.device.micro_bench import Row
from sparsesearch.cost.device.table import DeviceTable
from sparsesearch.kernels.schedule import Workers


def refitted(table: DeviceTable, rows: Sequence[Row]) -> DeviceTable:
    """The model of the same device from these rows."""
    return fitted(
        rows,
        name=table.name,
        device=table.device,
        kernel=table.backend,  # type: ignore[arg-type]
        workers=Workers(table.num_workers, table.l2_bytes),
        memory_bytes=table.memory_bytes,
        dtype_bytes=table.dtype_bytes,
        provenance=table.provenance | {"refitted": True},
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="micro-runs of the device")
    parser.add_argument("--model", type=Path, required=True, help="cost model of the same device")
    parser.add_argument("--json", type=Path, required=True, help="where to write the model")
    given = parser.parse_args()
    refitted(DeviceTable.load(given.model), json.loads(read_text(given.runs))["runs"]).save(given.json)


if __name__ == "__main__":
    main()
