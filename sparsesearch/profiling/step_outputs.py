"""What rules that choose anew for every decoded token make of the queries that stand for decoded ones."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.estimators import block_bounds
from sparsesearch.profiling.layer_scores import LayerInput, late_from
from sparsesearch.rules import Rule
from sparsesearch.step_blocks import StepBlocks


def chooses_steps(rule: Rule, grid: BlockGrid) -> bool:
    """Whether a candidate's tiles for a decoded token are not those of its row of tiles: it chooses them by itself, token by token."""
    step = BlockGrid(1, grid.kv_len, grid.block_tokens)
    return rule.decodes and not rule.reuses and not rule.keeps_all(step)


def decoded_queries(layer: LayerInput, span: slice) -> Int[Tensor, " Q"]:
    """Positions of the queries in a span that are late or hold an answer token."""
    position = torch.arange(span.start, span.stop, device=layer.q.device)
    decoded = position >= late_from(layer.q.shape[1])
    return position[decoded if layer.generated is None else decoded | layer.generated[span]]


def step_tiles(rule: Rule, layer: LayerInput, grid: BlockGrid, queries: Int[Tensor, " Q"]) -> Bool[Tensor, "H Q N"]:
    """The blocks that each of these queries would choose as the newest token, the whole sequence's length taken for its prompt's."""
    position = queries[None, None, :, None]
    law_tokens = torch.full_like(position[:, :, :1], grid.law_len)
    # the newest block is in whatever its bounds are, so those that later keys widen change nothing
    given = block_bounds(layer.k, grid) if rule.reads_bounds else (layer.k,)
    keys, *bounds = (x[None] for x in given)
    known = {"low": keys, "high": bounds[0]} if rule.reads_bounds else {"keys": keys}
    blocks = StepBlocks(position, law_tokens, grid.block_tokens, grid.num_k_blocks, **known)
    return rule.step_tiles(layer.q[None, :, queries], blocks)[0]


def step_outputs(
    rules: Sequence[Rule],
    layer: LayerInput,
    grid: BlockGrid,
    queries: Int[Tensor, " Q"],
    numerator: Float[Tensor, "H n Q D"],
    denominator: Float[Tensor, "H n Q"],
) -> Float[Tensor, "H C Q D"]:
    """Attention of these queries under the choice of each rule, from the sums of their tiles over the first n key blocks."""
    outputs = []
    for rule in rules:
        chosen = step_tiles(rule, layer, grid, queries)[..., : denominator.shape[1]].to(numerator.dtype)
        kept = torch.einsum("hqn,hnq->hq", chosen, denominator)
        outputs.append(torch.einsum("hqn,hnqd->hqd", chosen, numerator) / kept.clamp(min=1e-30)[..., None])
    return torch.stack(outputs, 1)
