"""How long the schedule of a long prompt takes to build on one CPU core: `python -m sparsesearch.bench.schedule [--json out.json]`.

1,024 query heads at 131,072 tokens, static rules, for a device of 132 multiprocessors and 60 MB of L2. `cpu_s` is the processor time of the
process, the best of three, which other jobs on the machine do not lengthen as they do `time_s`; `peak_bytes` is what NumPy's arrays of one build
take at most, where heads x blocks² booleans would take 1 and 4 GB.
"""

import argparse
import json
import platform
import sys
import tracemalloc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsesearch.artifacts import write_bytes
from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.schedule import Span, TileShape, Workers, schedule_of_rules
from sparsesearch.profiling.record import device_name
from sparsesearch.rules.base import Rule
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.search.speed import timed

FORMAT = "sparsesearch.bench.schedule"
NUM_HEADS, NUM_KV_HEADS, TOKENS = 1024, 256, 131072
WORKERS = Workers(132, 60 * 2**20)
REPEATS = 3


@dataclass(frozen=True)
class Case:
    """One plan and one kernel's tiles.

    Attributes:
        block_tokens: side of the rules' blocks.
        shape: queries and keys of a tile.
        num_rules: different rules, dealt to the heads in turn.
    """

    block_tokens: int
    shape: TileShape
    num_rules: int = 2

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Windows of 1,024 tokens and more behind a sink, one per head."""
        return tuple(SinkWindow(sink=128, window=1024 + 128 * (head % self.num_rules)) for head in range(NUM_HEADS))


CASES = (
    Case(128, TileShape(128, 128)),
    Case(64, TileShape(128, 64)),
    Case(64, TileShape(64, 64)),
    Case(64, TileShape(128, 64), num_rules=64),
)


def measure(case: Case) -> dict[str, Any]:
    """Seconds, bytes and size of one case's schedule."""
    span = Span(BlockGrid(TOKENS, TOKENS, case.block_tokens))
    rules = case.rules
    build = partial(
        schedule_of_rules.__wrapped__, rules, (span,), num_kv_heads=NUM_KV_HEADS, shape=case.shape, workers=WORKERS
    )
    times, schedule = min((timed(build) for _ in range(REPEATS)), key=lambda found: found[0]["cpu_s"])
    tracemalloc.start()
    build()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "block_tokens": case.block_tokens, "tile": [case.shape.rows, case.shape.keys], "rules": case.num_rules, **times,
        "peak_bytes": peak, "tiles": len(schedule.tiles), "entries": len(schedule.entries), "makespan": schedule.makespan,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the record")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        rows.append(measure(case))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
    if given.json is not None:
        provenance = {
            "command": "python -m sparsesearch.bench.schedule --json OUT", "device": device_name(torch.device("cpu")),
            "python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__, "threads": 1,
        }  # fmt: skip
        record = {"format": FORMAT, "provenance": provenance, "heads": NUM_HEADS, "tokens": TOKENS, "rows": rows}
        write_bytes(given.json, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
