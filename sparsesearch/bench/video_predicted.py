"""What a cost model says of a video layer: one launch per token order, replayed tile by tile, and the copies into and out of that order."""

import json
from pathlib import Path
from typing import Any

import torch

from sparsesearch.artifacts import read_text
from sparsesearch.bench.video_shapes import DENSITIES, MODELS, VideoModel, grid_of, mixed_rules
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.layer_schedule import choice_of
from sparsesearch.errors import ArtifactError
from sparsesearch.kernels.dispatch import tile_shape
from sparsesearch.kernels.schedule import HeadTiles, Span, build_schedule
from sparsesearch.order import Order
from sparsesearch.rules.base import Rule

FORMAT = "sparsesearch.bench.video"


def load_record(path: Path) -> dict[str, Any]:
    """What `bench.video.run` measured, from its file.

    Raises:
        ArtifactError: the file is missing, no JSON, or another bench's record.
    """
    try:
        record = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"{path} must be complete JSON, but is damaged at line {error.lineno}. Measure again."
        ) from error
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if found != FORMAT:
        raise ArtifactError(
            f"{path} must have format {FORMAT!r}, but has {found!r}. Give what `sparsesearch bench video` wrote."
        )
    return dict(record)


def predicted_s(model: VideoModel, rules: tuple[Rule, ...], costs: DeviceCostModel) -> float:
    """Seconds of one layer, as `kernels.ordered.attend` runs it.

    Heads of the model's own order are one launch over all heads, in which the others have no tiles; those of every other order are gathered
    (queries, keys, values), run, and put back.
    """
    by_order: dict[Order, list[Rule]] = {}
    for rule in rules:
        if rule.rest == "drop":
            by_order.setdefault(rule.token_order, []).append(rule)
    head_bytes = model.layout.num_tokens * model.head_dim * costs.table.dtype_bytes
    total = 0.0
    for order, own in by_order.items():
        total += _launch_s(model, own, costs)
        if not order.is_identity:
            total += 4 * costs.permutation_s(len(own) * head_bytes)
    return total


def with_predictions(record: dict[str, Any], costs: DeviceCostModel) -> dict[str, Any]:
    """A measured record with this model's predictions in it; needs no device, because static rules say which tiles they compute.

    Args:
        record: of `bench.video.run`.
        costs: of the device that the record names.
    """
    known = {model.name: model for model in MODELS}
    rows = []
    for row in record["rows"]:
        if "R" in row:
            model = known[row["model"]]
            target = min((*DENSITIES, model.density), key=lambda density: abs(density - row["density"]))
            rules = mixed_rules(model.layout, model.num_heads, row["mix"], target)
            row = {**row, "predicted_s": predicted_s(model, rules, costs)}
        rows.append(row)
    return {**record, "rows": rows, "predicted_by": costs.name}


def _launch_s(model: VideoModel, rules: list[Rule], costs: DeviceCostModel) -> float:
    """One launch of these heads, whose tokens stand in their order."""
    grid, distinct = grid_of(model.layout), list(dict.fromkeys(rules))
    tiles = HeadTiles(
        torch.stack([choice_of(rule, grid) for rule in distinct]), tuple(distinct.index(r) for r in rules)
    )
    schedule = build_schedule(
        (Span(grid),),
        [tiles],
        num_kv_heads=len(rules),
        shape=tile_shape(costs.kernel, model.head_dim, grid.block_tokens),
        workers=costs.workers,
        head_bytes=2 * model.head_dim,
    )
    return costs.attention_s(schedule, num_kv_heads=len(rules), head_dim=model.head_dim)
