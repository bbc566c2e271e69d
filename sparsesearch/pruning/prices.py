"""What a sublayer costs at a size: parameters, FLOPs, bytes, seconds. Embeddings and norms, which no cut touches, are left out."""

from dataclasses import dataclass

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.base import CostModel, UnitWork
from sparsesearch.errors import SpecError
from sparsesearch.pruning.record import LayerShape


@dataclass(frozen=True)
class SublayerSize:
    """A sublayer after a cut: heads and KV heads, or channels."""

    heads: int = 0
    kv_heads: int = 0
    channels: int = 0


def params(shape: LayerShape, size: SublayerSize) -> float:
    """Weights and biases of the projections. The output projection's bias, if any, stays and is not counted."""
    rows = (size.heads + 2 * size.kv_heads) * shape.head_dim + size.channels * shape.into_feed_forward
    columns = size.heads * shape.head_dim + size.channels
    return float((rows + columns) * shape.hidden + (rows if shape.biased else 0))


def flops(shape: LayerShape, size: SublayerSize, length: int, *, causal: bool) -> float:
    """Multiply-adds times two, of one sequence: projections, and attention's two products over the pairs a mask allows."""
    pairs = length * (length + 1) / 2 if causal else length**2
    return 2 * length * params(shape, size) + 4 * pairs * size.heads * shape.head_dim


def memory_bytes(shape: LayerShape, size: SublayerSize, length: int, *, causal: bool, dtype_bytes: int) -> float:
    """Weights, and for causal models the keys and values of one cached sequence."""
    cached = 2 * size.kv_heads * shape.head_dim * length if causal else 0
    return dtype_bytes * (params(shape, size) + cached)


def projection_s(shape: LayerShape, size: SublayerSize, length: int, cost_model: CostModel) -> float:
    """Seconds of the projections for one sequence.

    A cost model that has timed matrix products answers itself (its `linear_s(rows, outputs, inputs)`). Otherwise FLOPs are priced at
    the rate of the same model's dense attention over a long sequence, the only matrix products it knows.
    """
    products = []
    if size.heads:
        wide = (size.heads + 2 * size.kv_heads) * shape.head_dim
        products += [(shape.hidden, wide), (size.heads * shape.head_dim, shape.hidden)]
    if size.channels:
        products += [(shape.hidden, size.channels * shape.into_feed_forward), (size.channels, shape.hidden)]
    timed = getattr(cost_model, "linear_s", None)
    if timed is not None and getattr(cost_model, "prices_layers", True):  # a CPU's older tables know attention alone
        return float(sum(timed(length, outputs, inputs) for inputs, outputs in products))
    rate = _attention_flop_per_s(cost_model, max(shape.head_dim, 1))
    return sum(2 * length * inputs * outputs for inputs, outputs in products) / rate


def attention_s(shape: LayerShape, size: SublayerSize, length: int, cost_model: CostModel, *, causal: bool) -> float:
    """Seconds of dense attention; a bidirectional one counts as two causal ones."""
    if not size.kv_heads:
        return 0.0
    work = dense_work(length, shape.head_dim, size.heads // size.kv_heads)
    return size.kv_heads * cost_model.unit_latency_s(work) * (1 if causal else 2)


def dense_work(length: int, head_dim: int, query_heads: int, block_tokens: int = 64) -> UnitWork:
    """Dense attention of one KV group, in the words of the cost models."""
    grid = BlockGrid(length, length, block_tokens)
    return UnitWork(
        "dense", length, length, head_dim, query_heads, query_blocks=grid.num_q_blocks, block_tokens=block_tokens
    )


def _attention_flop_per_s(cost_model: CostModel, head_dim: int) -> float:
    length = 4096
    work = dense_work(length, head_dim, 1)
    seconds = cost_model.unit_latency_s(work)
    if not seconds > 0:
        raise SpecError(
            f"cost model {cost_model.name} must give dense attention a positive time, but gave {seconds:g} s."
        )
    return 4.0 * head_dim * work.pairs / seconds
