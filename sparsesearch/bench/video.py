"""Attention of published video transformers at their true shapes: static rules on random tensors against forced cuDNN.

    sparsesearch bench video -o out.json

Static rules do not look at the data, so random queries, keys and values give true times; they say nothing about quality. Every time includes
the copies into and out of token orders. A plan, its tiles alone and cuDNN take turns while they are timed, because the card's clock depends on
what ran before. R = t / (density · t_dense): 1 means that a skipped tile costs nothing, a computed one what it costs
cuDNN, and orders nothing. `projected_speedup` is 1 / (1 - share + share · t/t_dense), with the share of attention in the published dense
model: a projection, not a measurement of a pipeline; `published_speedup` is what Sparse-vDiT (arXiv:2506.03065, table 2) measured on its own
hardware.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsesearch.bench.predicted import shipped_costs
from sparsesearch.bench.timing import captured, ceilings, in_turns_s, median_s, provenance
from sparsesearch.bench.video_predicted import FORMAT, with_predictions
from sparsesearch.bench.video_shapes import (
    DENSITIES,
    MODELS,
    Mix,
    VideoModel,
    grid_of,
    layer_density,
    mixed_rules,
    rules_of,
)
from sparsesearch.block_mask import expand
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.device.compile_ahead import run_all
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.errors import SparseSearchError
from sparsesearch.kernels.dispatch import Backend, run_schedule, schedule_for
from sparsesearch.kernels.ordered import attend
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.kernels.row_copies import put_rows, take_rows
from sparsesearch.kernels.schedule import Span
from sparsesearch.layout import Layout, video_layout
from sparsesearch.order import Order
from sparsesearch.rules.base import Rule

SMALL = (video_layout(5, 9, 22, text_first=37), video_layout(6, 10, 23, text_last=41), video_layout(4, 8, 16))
"""Layouts that the kernels are checked on: text at either end, and none."""
LEAST_TURNS = 3
"""Of a plan and cuDNN, which takes 0.3 s on the longest sequence."""


def run(
    *,
    models: Sequence[VideoModel] = MODELS,
    densities: Sequence[float] = DENSITIES,
    mixes: Sequence[Mix] = ("modes", "bands", "spatial", "temporal"),
    backend: Backend = "gluon",
    cost_model: str | None = None,
    budget_s: float = 0.3,
    command: list[str] | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Check small layers against the oracle, then time every model, mix and density; predictions are made once all is measured.

    Args:
        models: shapes.
        densities: besides each model's published one; mixes but the first are timed at the published one only.
        mixes: see `mixed_rules`.
        backend: whose kernels.
        cost_model: name or file whose prediction stands beside the measurement; the shipped one of this device by default.
        budget_s: device time per case.
        command: recorded as the command line.
        progress: called with the record so far whenever a row is finished.
    """
    costs = shipped_costs() if cost_model is None else load_cost_model(cost_model)
    known = costs if isinstance(costs, DeviceCostModel) else None
    rows: list[dict[str, Any]] = []
    record = {
        "format": FORMAT,
        "provenance": provenance(command),
        "ceilings": ceilings(),
        "rows": rows,
        "predicted_by": None,
    }
    head_dims = sorted({model.head_dim for model in models})
    compile_ahead(backend, head_dims)
    for head_dim in head_dims:
        rows.append(check_small(backend, head_dim))
        progress(record)
    layers = [_Layer(model, backend, budget_s) for model in models]
    for case in range(
        len(mixes) + len(densities)
    ):  # the published density of every model first: a run may be cut short
        for layer in layers:
            mixed = case < len(mixes)
            mix, target = (mixes[case], layer.model.density) if mixed else (mixes[0], densities[case - len(mixes)])
            rows.append(layer.measure(mix, target))
            progress(record)
    return record if known is None else with_predictions(record, known)


class _Layer:
    """Tensors of one model's layer, and its dense attention, captured once."""

    def __init__(self, model: VideoModel, backend: Backend, budget_s: float) -> None:
        self.model, self.backend, self.budget_s = model, backend, budget_s
        self.grid, self.scale = grid_of(model.layout), model.head_dim**-0.5
        self.q, self.k, self.v = random_tensors(model.layout, model.num_heads, model.head_dim, "cuda")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            self.dense = captured(lambda: F.scaled_dot_product_attention(self.q, self.k, self.v))

    def measure(self, mix: Mix, target: float) -> dict[str, Any]:
        """Times of one plan: whole, tiles alone, copies alone; and what they mean. A failure is a row that says so."""
        model = self.model
        row: dict[str, Any] = {"model": model.name, "tokens": self.grid.kv_len, "heads": model.num_heads}
        row |= {"head_dim": model.head_dim, "mix": mix}
        try:
            rules = mixed_rules(model.layout, model.num_heads, mix, target)
            share = layer_density(model.layout, rules)
            seconds, tiles_s, dense_s = self._seconds(rules)
            ratio = seconds / dense_s
            row |= {
                "density": share,
                "dense_s": dense_s,
                "seconds": seconds,
                "tiles_s": tiles_s,
                "copies_s": self._copies_s(rules),
                "R": ratio / share,
                "attention_speedup": 1 / ratio,
                "attention_share": model.share,
                "projected_speedup": 1 / (1 - model.share + model.share * ratio),
                "published_density": model.density,
                "published_speedup": model.published_speedup,
            }
        except (RuntimeError, SparseSearchError) as error:
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        return row

    def _seconds(self, rules: tuple[Rule, ...]) -> tuple[float, ...]:
        """The plan; its heads in one launch, as if their tokens already stood in order; and dense."""
        schedule = schedule_for(self.q, self.k, (Span(self.grid),), rules, self.backend)
        heads = self.q, self.k, self.v

        def plan() -> Tensor:
            return attend(*heads, self.grid, rules, scale=self.scale, backend=self.backend)

        def tiles() -> Tensor:
            return run_schedule(*heads, schedule, scale=self.scale, kernel=self.backend)[0]

        return in_turns_s(captured(plan), captured(tiles), self.dense, budget_s=self.budget_s, least=LEAST_TURNS)

    def _copies_s(self, rules: tuple[Rule, ...]) -> float:
        orders: dict[Order, list[int]] = {}
        for head, rule in enumerate(rules):
            if not rule.token_order.is_identity:
                orders.setdefault(rule.token_order, []).append(head)
        if not orders:
            return 0.0
        out = torch.empty_like(self.q)
        work = [
            (torch.tensor(heads, device=self.q.device), order.permutation(self.model.layout, self.q.device))
            for order, heads in orders.items()
        ]

        def copies() -> None:
            for heads, permutation in work:
                parts = [take_rows(x, heads, permutation) for x in (self.q, self.k, self.v)]
                put_rows(out, parts[0], heads, permutation)

        return median_s(copies, budget_s=self.budget_s / 4)


def compile_ahead(backend: Backend, head_dims: Sequence[int], device: str = "cuda") -> None:
    """Run the small layouts of every head width at once: compiling the kernels one after the other takes longer than all measurements."""

    def attend_small(head_dim: int, layout: Layout) -> None:
        rules = rules_of(24, "modes", 0.15)
        q, k, v = random_tensors(layout, len(rules), head_dim, device)
        attend(q, k, v, grid_of(layout), rules, scale=head_dim**-0.5, backend=backend)

    run_all(device, [partial(attend_small, *case) for case in product(head_dims, SMALL)])


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
    for layout in SMALL:
        rules, grid = rules_of(24, "modes", 0.15), grid_of(layout)
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
