"""What rest terms cost at the true shapes: one attention layer of published video models under a band of density 0.25, with each rest.

Run on a GPU: python -m sparsesearch.bench.rest_times --json OUT. Queries, keys and values are random: these are times, not qualities.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsesearch.bench.timing import median_s, provenance
from sparsesearch.bench.video import random_tensors
from sparsesearch.bench.video_shapes import MODELS, VideoModel, grid_of
from sparsesearch.kernels.ordered import StepMemory, attend
from sparsesearch.rules import Rule, parse_rule
from sparsesearch.rules.cached_rest import CachedRest

BAND: dict[str, Any] = {"kind": "diagonal_band", "reach": {"b": 0.134}, "order": "tile(4,4,8)"}
RESTS: dict[str, dict[str, Any]] = {
    "drop": {},
    "means": {"kind": "taylor_rest", "terms": 0},
    "taylor": {"kind": "taylor_rest", "terms": 1},
    "rectified": {"kind": "rectified_rest", "gate": False},
    "cached, between refreshes": {"kind": "cached_rest"},
}


def run(
    models: tuple[VideoModel, ...] = MODELS, *, budget_s: float = 0.5, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Time every rest on every model.

    Returns:
        The record: provenance and one row per model and rest, with seconds, the dense layer's (cuDNN), and the work that the plan is charged.
    """
    rows = []
    for model in models:
        q, k, v = random_tensors(model.layout, model.num_heads, model.head_dim, "cuda")
        grid, scale = grid_of(model.layout), model.head_dim**-0.5
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            dense_s = median_s(partial(F.scaled_dot_product_attention, q, k, v), budget_s=budget_s)
        for name, data in RESTS.items():
            rule: Rule = parse_rule({**data, "of": BAND} if data else BAND, where="bench")
            rules = (rule,) * model.num_heads
            memory = StepMemory(step=0)
            attend(q, k, v, grid, rules, scale=scale, memory=memory)  # a cached rest measures its residual here
            memory.step = 1
            once = partial(attend, q, k, v, grid, rules, scale=scale, memory=memory)
            seconds = median_s(once, budget_s=budget_s)
            work = (
                rule.of.work(rule.of.levels(grid), grid)
                if isinstance(rule, CachedRest)
                else rule.work(rule.levels(grid), grid)
            )
            share = float(work) / float(grid.reachable().sum())
            rows.append({"model": model.name, "rest": name, "seconds": seconds, "dense_s": dense_s, "work": share})
            progress(
                f"{model.name:16} {name:26} work {share:.3f} {1e3 * seconds:8.2f} ms of {1e3 * dense_s:8.2f} dense"
            )
    return {"provenance": provenance(), "rows": rows}


def main() -> None:
    """Entry point of `python -m sparsesearch.bench.rest_times`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(model.name for model in MODELS))
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    wanted = given.models.split(",")
    record = run(
        tuple(model for model in MODELS if model.name in wanted), progress=lambda said: print(said, file=sys.stderr)
    )
    given.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
