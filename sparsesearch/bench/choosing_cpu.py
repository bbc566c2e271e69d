"""What choosing the keys of a decoded token takes on this processor, put into its cost model without measuring the rest again.

python -m sparsesearch.bench.choosing_cpu --update cost_models/cpu.json
"""

import argparse
import sys
from pathlib import Path

import torch

from sparsesearch.cost.cpu_cases import FULL, all_cases, measure, step_group, step_rules
from sparsesearch.cost.cpu_fit import fit_decode, fit_steps
from sparsesearch.cost.table import CostTable


def updated(table: CostTable, time_limit_s: float) -> CostTable:
    """The cost model with `step_choices` measured now, which its provenance says; reading is measured beside them, as they add to it."""
    generator = torch.Generator().manual_seed(0)
    groups = {"decode", *map(step_group, step_rules())}
    cases = [case for case in all_cases(FULL, generator) if case.group in groups]
    rounds = measure(cases, time_limit_s, torch.float32, generator, lambda *_: None)
    found = fit_steps(cases, fit_decode([case for case in cases if case.group == "decode"]))
    return table.model_copy(
        update={
            "step_choices": found,
            "provenance": table.provenance
            | {"step_choices": f"measured apart, {rounds} rounds, torch {torch.__version__}"},
        }
    )


def main() -> None:
    """Command line: the prices on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", type=Path, required=True, help="cost model of this processor")
    parser.add_argument("--time-limit", type=float, default=15.0, help="seconds")
    given = parser.parse_args()
    table = updated(CostTable.load(given.update), given.time_limit)
    table.save(given.update)
    for kind, curves in table.step_choices.items():
        for curve in curves:
            shown = ", ".join(f"{n}: {1e6 * s:.0f} us" for n, s in zip(curve.tokens, curve.seconds, strict=True))
            sys.stderr.write(f"{kind}, head_dim {curve.head_dim}, per query head: {shown}\n")


if __name__ == "__main__":
    main()
