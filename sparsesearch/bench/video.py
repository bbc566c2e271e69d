"""Attention of published video transformers at their true shapes: static rules on random tensors against forced cuDNN.

    python -m sparsesearch.bench.video --json out.json

Static rules do not look at the data, so random queries, keys and values give true times; they say nothing about quality. Every time includes
the copies into and out of token orders. R = t / (density · t_dense): 1 means that a skipped tile costs nothing, a computed one what it costs
cuDNN, and orders nothing. `projected_speedup` is 1 / (1 - share + share · t/t_dense), with the share of attention in the published dense
model: a projection, not a measurement of a pipeline; `published_speedup` is what Sparse-vDiT (arXiv:2506.03065, table 2) measured on its own
hardware.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsesearch.bench.timing import ceilings, median_s, provenance
from sparsesearch.block_mask import BlockGrid, density, expand
from sparsesearch.cost import UnitWork, load_cost_model
from sparsesearch.errors import SparseSearchError
from sparsesearch.kernels.dispatch import Backend, run_schedule, schedule_for
from sparsesearch.kernels.ordered import attend
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.kernels.row_copies import put_rows, take_rows
from sparsesearch.kernels.schedule import Span
from sparsesearch.layout import Layout, video_layout
from sparsesearch.order import TOKEN_MAJOR, Order, Tile
from sparsesearch.rules.base import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.diagonal_band import DiagonalBand
from sparsesearch.rules.first_frames import FirstFrames
from sparsesearch.rules.neighbourhood import Neighbourhood
from sparsesearch.rules.zero import Zero

BLOCK_TOKENS = 128
Mix = Literal["spatial", "temporal", "bands", "modes"]


@dataclass(frozen=True)
class VideoModel:
    """One attention layer of a published model, and what Sparse-vDiT reports of the whole.

    Attributes:
        share: attention's part of the dense model's operations (4·N²·d·layers·passes over the stated total).
        density: implied by the reported operations.
        published_speedup: end to end, Sparse-vDiT.
    """

    name: str
    layout: Layout
    num_heads: int
    head_dim: int
    share: float
    density: float
    published_speedup: float


MODELS = (
    VideoModel("CogVideoX1.5-5B", video_layout(11, 48, 85, text_first=226), 48, 64, 0.71, 0.265, 1.76),
    VideoModel("Wan2.1-14B", video_layout(21, 45, 80), 40, 128, 0.71, 0.438, 1.58),
    VideoModel("HunyuanVideo", video_layout(33, 45, 80, text_last=256), 24, 128, 0.85, 0.320, 1.85),
)


def grid_of(layout: Layout) -> BlockGrid:
    """The whole sequence against itself."""
    return BlockGrid(layout.num_tokens, layout.num_tokens, BLOCK_TOKENS, causal=False, layout=layout)


@lru_cache(maxsize=64)
def mixed_rules(layout: Layout, num_heads: int, mix: Mix, target: float) -> tuple[Rule, ...]:
    """Rules of one layer whose density is as close to `target` as the band's reach allows.

    spatial: frame-major bands, no copies. temporal: token-major bands, every head copied. bands: half of each. modes: of every 12 heads one
    is dense, one zero, one sees the first frame, the others are spatial and temporal bands and one neighbourhood of boxes in turn.
    """
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        if layer_density(layout, _rules(num_heads, mix, middle)) < target:
            low = middle
        else:
            high = middle
    return _rules(num_heads, mix, high)


def _rules(num_heads: int, mix: Mix, reach: float) -> tuple[Rule, ...]:
    spatial = DiagonalBand(reach=LengthLaw(b=reach))
    temporal = DiagonalBand(reach=LengthLaw(b=reach), order=TOKEN_MAJOR)
    boxes = Neighbourhood(window=(0, 13, 25), order=Tile(4, 4, 8))
    cycle: tuple[Rule, ...]
    match mix:
        case "spatial":
            cycle = (spatial,)
        case "temporal":
            cycle = (temporal,)
        case "bands":
            cycle = (spatial, temporal)
        case "modes":
            cycle = (
                Dense(),
                spatial,
                temporal,
                FirstFrames(),
                temporal,
                spatial,
                Zero(),
                temporal,
                spatial,
                boxes,
                spatial,
                temporal,
            )
    return tuple(cycle[head % len(cycle)] for head in range(num_heads))


def layer_density(layout: Layout, rules: Sequence[Rule]) -> float:
    """Mean density of the heads."""
    grid = grid_of(layout)
    return sum(_rule_density(rule, grid) for rule in rules) / len(rules)


@lru_cache(maxsize=256)
def _rule_density(rule: Rule, grid: BlockGrid) -> float:
    return density(rule.select(grid), grid)


def run(
    *,
    models: Sequence[VideoModel] = MODELS,
    densities: Sequence[float] = (0.25, 0.35, 0.45),
    mixes: Sequence[Mix] = ("modes", "bands", "spatial", "temporal"),
    backend: Backend = "gluon",
    cost_model: str | None = None,
    budget_s: float = 0.3,
    command: list[str] | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Check small layers against the oracle, then time every model, density and mix.

    Args:
        models: shapes.
        densities: besides each model's published one; mixes but the first are timed at the published one only.
        mixes: see `mixed_rules`.
        backend: whose kernels.
        cost_model: name or file; its prediction stands beside the measurement.
        budget_s: device time per case.
        command: recorded as the command line.
        progress: called with each finished row.
    """
    rows = [check_small(backend, head_dim) for head_dim in (64, 128)]
    for row in rows:
        progress(row)
    for model in models:
        layer = _Layer(model, backend, budget_s, cost_model)
        cases = [(mixes[0], target) for target in densities] + [(mix, model.density) for mix in mixes]
        for mix, target in cases:
            row = layer.measure(mix, target)
            rows.append(row)
            progress(row)
        del layer
        torch.cuda.empty_cache()
    return {
        "format": "sparsesearch.bench.video",
        "provenance": provenance(command),
        "ceilings": ceilings(),
        "rows": rows,
    }


class _Layer:
    """Tensors of one model's layer, and its dense time."""

    def __init__(self, model: VideoModel, backend: Backend, budget_s: float, cost_model: str | None) -> None:
        self.model, self.backend, self.budget_s, self.cost_model = model, backend, budget_s, cost_model
        self.grid, self.scale = grid_of(model.layout), model.head_dim**-0.5
        self.q, self.k, self.v = random_tensors(model.layout, model.num_heads, model.head_dim, "cuda")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            self.dense_s = median_s(lambda: F.scaled_dot_product_attention(self.q, self.k, self.v), budget_s=budget_s)

    def measure(self, mix: Mix, target: float) -> dict[str, Any]:
        """Times of one plan: whole, tiles alone, copies alone; what they mean; and what was predicted. A failure is a row that says so."""
        model = self.model
        row: dict[str, Any] = {"model": model.name, "tokens": self.grid.kv_len, "heads": model.num_heads}
        row |= {"head_dim": model.head_dim, "mix": mix, "dense_s": self.dense_s}
        try:
            rules = mixed_rules(model.layout, model.num_heads, mix, target)
            share = layer_density(model.layout, rules)
            seconds = median_s(lambda: self._attend(rules), budget_s=self.budget_s)
            ratio = seconds / self.dense_s
            row |= {
                "density": share,
                "seconds": seconds,
                "tiles_s": self._tiles_s(rules),
                "copies_s": self._copies_s(rules),
                "R": ratio / share,
                "attention_speedup": 1 / ratio,
                "attention_share": model.share,
                "projected_speedup": 1 / (1 - model.share + model.share * ratio),
                "published_density": model.density,
                "published_speedup": model.published_speedup,
                "predicted_s": self._predicted_s(rules),
            }
        except (RuntimeError, SparseSearchError) as error:
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        return row

    def _attend(self, rules: tuple[Rule, ...]) -> Tensor:
        return attend(self.q, self.k, self.v, self.grid, rules, scale=self.scale, backend=self.backend)

    def _tiles_s(self, rules: tuple[Rule, ...]) -> float:
        """All heads in one launch, as if their tokens already stood in order."""
        schedule = schedule_for(self.q, self.k, (Span(self.grid),), rules, self.backend)
        return median_s(
            lambda: run_schedule(self.q, self.k, self.v, schedule, scale=self.scale, kernel=self.backend),
            budget_s=self.budget_s,
        )

    def _copies_s(self, rules: tuple[Rule, ...]) -> float:
        orders: dict[Order, list[int]] = {}
        for head, rule in enumerate(rules):
            if not rule.token_order.is_identity:
                orders.setdefault(rule.token_order, []).append(head)
        if not orders:
            return 0.0
        out = torch.empty_like(self.q)
        work = [
            (torch.tensor(heads, device="cuda"), order.permutation(self.model.layout, "cuda"))
            for order, heads in orders.items()
        ]

        def copies() -> None:
            for heads, permutation in work:
                parts = [take_rows(x, heads, permutation) for x in (self.q, self.k, self.v)]
                put_rows(out, parts[0], heads, permutation)

        return median_s(copies, budget_s=self.budget_s / 4)

    def _predicted_s(self, rules: tuple[Rule, ...]) -> float | None:
        """The cost model's seconds for the layer, copies not included; None without one."""
        if self.cost_model is None:
            return None
        grid = self.grid
        works = [
            UnitWork(
                kind="zero" if rule.rest == "zero" else "tiles",
                q_len=grid.q_len,
                kv_len=grid.kv_len,
                head_dim=self.model.head_dim,
                tiles=_rule_density(rule, grid) * grid.num_q_blocks * grid.num_k_blocks,
                query_blocks=grid.num_q_blocks,
                block_tokens=grid.block_tokens,
            )
            for rule in rules
        ]
        return float(load_cost_model(self.cost_model).latency_s(works).sum())


def random_tensors(layout: Layout, num_heads: int, head_dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded normal bf16 queries, keys and values of one sequence."""
    generator = torch.Generator(device).manual_seed(layout.num_tokens + head_dim)
    shape = (1, num_heads, layout.num_tokens, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(3))
    return q, k, v


def check_small(backend: Backend, head_dim: int, device: str = "cuda") -> dict[str, Any]:
    """Every mix's rules on a small layout with text at either end, against the fp64 oracle in the model's own order.

    Raises:
        AssertionError: an error exceeds what bf16 outputs and probabilities explain: 2^-7 of the largest output.
    """
    worst = 0.0
    for layout in (
        video_layout(5, 9, 22, text_first=37),
        video_layout(6, 10, 23, text_last=41),
        video_layout(4, 8, 16),
    ):
        rules, grid = _rules(24, "modes", 0.15), grid_of(layout)
        q, k, v = random_tensors(layout, len(rules), head_dim, device)
        scale = head_dim**-0.5
        out = attend(q, k, v, grid, rules, scale=scale, backend=backend)
        for head, rule in enumerate(rules):
            there, back = rule.token_order.permutation(layout, device), rule.token_order.inverse(layout, device)
            tiles = rule.select(grid, q[0, head, there], k[0, head, there])
            mask = expand(tiles, grid).to(device)[back][:, back]
            expected = masked_attention(
                q[0, head].double(), k[0, head].double(), v[0, head].double(), mask, scale=scale
            )[0]
            error = (out[0, head].double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            worst = max(worst, float(error))
    assert worst < 2**-7, f"{backend}, head_dim {head_dim}: relative error {worst}"
    return {"check": "small layouts against the fp64 oracle", "head_dim": head_dim, "relative_error": worst}


def main() -> None:
    """Command line: all cases, a line of JSON per row on stderr, the whole record in a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.25, 0.35, 0.45])
    parser.add_argument("--backend", default="gluon", choices=["gluon", "triton"])
    parser.add_argument("--cost-model", help="name or file of a cost model whose prediction is printed beside")
    given = parser.parse_args()

    def show(row: dict[str, Any]) -> None:
        sys.stderr.write(json.dumps(row) + "\n")

    record = run(densities=given.densities, backend=given.backend, cost_model=given.cost_model, progress=show)
    given.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
