"""What a plan's attention and its whole prefill take on a processor, beside dense and beside the predictions, at prompts short and long.

    OMP_NUM_THREADS=1 python -m sparsesearch.bench.cost_cpu --json out.json [--cost-model cpu.json]

With one thread the times are its CPU time, so a machine that others use shows the same.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sparsesearch.artifacts import write_bytes
from sparsesearch.cost import CostModel, load_cost_model
from sparsesearch.cost.cpu_cases import clock
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.predicted import predicted_seconds
from sparsesearch.evaluate.timing import Stopwatch
from sparsesearch.plan import Plan
from sparsesearch.presets import preset_path
from sparsesearch.runtime.live import apply
from sparsesearch.runtime.loading import load_model

FORMAT = "sparsesearch.bench.cost_cpu"


def measured(plan: Plan, costs: CostModel, lengths: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Medians of dense's and of the plan's attention and prefill, interleaved, and what the cost model says of both."""
    model, _ = load_model(plan.base_model.name_or_path, with_plan=False)
    variants: dict[str, Plan | None] = {"dense": None, "plan": plan}
    for length in lengths:
        ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
        stopwatch = Stopwatch(Head(model), ids, apply)
        runs = stopwatch(variants, rounds=rounds, part="attention")
        whole = stopwatch(variants, rounds=rounds)
        predicted = predicted_seconds(model, variants, length, costs)
        yield {
            "length": length,
            "rounds": rounds,
            **{f"{name}_s": median(own) for name, own in runs.items()},
            **{f"predicted_{name}_s": found["attention_s"] for name, found in predicted.items()},
            **{f"{name}_prefill_s": median(own) for name, own in whole.items()},
            **{
                f"predicted_{name}_prefill_s": found["prefill_s"]
                for name, found in predicted.items()
                if "prefill_s" in found
            },
            "ratio": median(own / dense for own, dense in zip(runs["plan"], runs["dense"], strict=True)),
            "predicted_ratio": predicted["plan"]["attention_s"] / predicted["dense"]["attention_s"],
        }


def main() -> None:
    """Command line: a line per length on stderr, the record in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument("--plan", type=Path, default=preset_path("profiles", "needle-7m-plan"))
    parser.add_argument("--cost-model", default="cpu", help="shipped name or file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    costs, rows = load_cost_model(given.cost_model), []
    for row in measured(Plan.load(given.plan), costs, given.lengths, given.rounds):
        rows.append(row)
        sys.stderr.write(
            f"{row['length']:6} tokens: plan over dense {row['ratio']:.2f}, predicted {row['predicted_ratio']:.2f}; dense "
            f"{1e3 * row['dense_s']:.1f} ms, predicted {1e3 * row['predicted_dense_s']:.1f} ms; prefill "
            + ", ".join(
                f"{1e3 * row[key]:.1f} ({key.removesuffix('_prefill_s')})" for key in row if key.endswith("prefill_s")
            )
            + " ms\n"
        )
    record = {
        "format": FORMAT,
        "cost_model": costs.name,
        "provenance": {
            "command": " ".join(["python -m sparsesearch.bench.cost_cpu", *sys.argv[1:]]),
            "device": costs.device,
            "threads": torch.get_num_threads(),
            "clock": clock().name,
            "torch": torch.__version__,
        },
        "rows": rows,
    }
    write_bytes(given.json, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
