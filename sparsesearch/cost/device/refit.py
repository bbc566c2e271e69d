"""Fit an accelerator's micro-runs again, without the device: after a change of the fit, when some are taken from another run, or to see what a run is worth.

    python -m sparsesearch.cost.device.refit --runs h200.runs.json [other.json ...] --model cost_models/h200.json --json cost_models/h200.json

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


def refitted(table: DeviceTable, rows: Sequence[Row], *, again: Sequence[str] = ()) -> DeviceTable:
    """The model of the same device from these rows; `again` names the groups that come from another calibration of it."""
    later = {"from_another_calibration": sorted(again)} if again else {}
    return fitted(
        rows,
        name=table.name,
        device=table.device,
        kernel=table.backend,  # type: ignore[arg-type]
        workers=Workers(table.num_workers, table.l2_bytes),
        memory_bytes=table.memory_bytes,
        dtype_bytes=table.dtype_bytes,
        provenance=table.provenance | {"refitted": True} | later,
    )


def joined(runs: Sequence[Sequence[Row]]) -> tuple[list[Row], set[str]]:
    """One list of several: of a case that more than one has measured, the last one's row; and the groups to which later ones have added.

    So a calibration that was cut short can be completed by an earlier one.
    """
    first, *others = runs
    rows = {_case(row): row for row in first}
    for other in others:
        rows |= {_case(row): row for row in other}
    return list(rows.values()), {row["group"] for other in others for row in other}


def _case(row: Row) -> tuple[tuple[str, object], ...]:
    return tuple(sorted((key, value) for key, value in row.items() if key not in ("seconds", "spread", "hz")))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs",
        type=Path,
        required=True,
        nargs="+",
        help="micro-runs of the device; later files' cases replace earlier ones'",
    )
    parser.add_argument("--model", type=Path, required=True, help="cost model of the same device")
    parser.add_argument("--json", type=Path, required=True, help="where to write the model")
    given = parser.parse_args()
    rows, again = joined([json.loads(read_text(path))["runs"] for path in given.runs])
    refitted(DeviceTable.load(given.model), rows, again=sorted(again)).save(given.json)


if __name__ == "__main__":
    main()
