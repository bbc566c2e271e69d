"""How far a kernel's output is from attention in fp64, on the last queries of a call: they see the most keys."""

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.rules.base import Rule

SAMPLED_QUERIES = 256


def exact_rows(
    q: Float[Tensor, "1 H S D"],
    k: Float[Tensor, "1 G S D"],
    v: Float[Tensor, "1 G S D"],
    rules: tuple[Rule, ...],
    grid: BlockGrid,
    *,
    scale: float,
) -> Float[Tensor, "H rows D"]:
    """The last SAMPLED_QUERIES outputs of every head under its static rule, in fp64, one head at a time."""
    rows = min(SAMPLED_QUERIES, grid.q_len)
    tail = BlockGrid(rows, grid.kv_len, grid.block_tokens, grid.law_len, grid.causal)
    masks = {rule: expand(rule.select(grid)[-tail.num_q_blocks :], tail).to(q.device) for rule in dict.fromkeys(rules)}
    group = q.shape[1] // k.shape[1]
    heads = [
        masked_attention(
            q[0, head, -rows:].double(), k[0, head // group], v[0, head // group], masks[rule], scale=scale
        )[0]
        for head, rule in enumerate(rules)
    ]
    return torch.stack(heads)


def relative_error(out: Float[Tensor, "1 H S D"], exact: Float[Tensor, "H rows D"]) -> float:
    """‖out - exact‖ / ‖exact‖ over the sampled rows; NaN where a row was never written."""
    got = out[0, :, -exact.shape[1] :].double()
    return float((got - exact).norm() / exact.norm())
