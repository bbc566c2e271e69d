"""All of a model's layers but their attention, priced by shape: linear layers, norms, rotation, gate, residuals, or a fused step's products."""

from sparsesearch.cost.layer_costs import LayerCosts, PartCosts, PrefillCosts
from sparsesearch.errors import SpecError
from sparsesearch.model_shapes import ModelShape

WEIGHT_BYTES = 2
FUSED_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures whose decoding steps the runtime fuses; `runtime.fused_layers` recognises them by their parts."""


def prefill_rest_s(shape: ModelShape, costs: PrefillCosts, *, rows: int, batch: int) -> float:
    """All of a prefill over `rows` tokens but its attention."""
    linear_s, pointwise_s = parts_s(shape, costs, rows=rows, last_rows=batch)
    return linear_s + pointwise_s * (1 - costs.prefill_relief(rows))


def decode_rest_s(
    shape: ModelShape, costs: LayerCosts, *, batch: int, fused: bool | None = None, turn: bool = True
) -> float:
    """All of a decoding step but its attention.

    Args:
        shape: the model.
        costs: the device.
        batch: sequences.
        fused: whether the step is fused; None: as the runtime does it, `is_fused`.
        turn: with what passes until the next step: tokens chosen and handed on.

    Raises:
        SpecError: a fused step is asked for, but this device's was not measured.
    """
    turn_s = costs.decode_turn_s(batch) if turn else 0.0
    if is_fused(shape, costs, batch) if fused is None else fused:
        return _fused_rest_s(shape, costs, batch) + turn_s
    widest = max(shape.intermediate_size, shape.num_heads * shape.head_dim)
    glue_s = shape.num_layers * costs.decode_glue_s(batch, float(shape.hidden_size * widest * WEIGHT_BYTES))
    return sum(parts_s(shape, costs, rows=batch, last_rows=batch)) + glue_s + costs.decode_step_s(batch) + turn_s


def is_fused(shape: ModelShape, costs: LayerCosts, batch: int) -> bool:
    """Whether `runtime.decode_step` fuses the steps of a model of this shape in bfloat16, and the device's fused step was measured."""
    known = costs.fused
    return known is not None and batch <= known.most_rows and shape.model_type in FUSED_MODEL_TYPES


def _fused_rest_s(shape: ModelShape, costs: LayerCosts, batch: int) -> float:
    fused = costs.fused
    if fused is None:
        raise SpecError(f"cost model {costs.name} must know the fused decoding step. Calibrate again.")
    products_s = sum(fused.product_s(batch, lines, inner) for lines, inner in fused_widths(shape))
    head_s = fused.product_s(batch, shape.vocab_size, shape.hidden_size)
    step_s = fused.start_s(batch) + costs.decode_step_s(batch)
    weight_bytes = float(WEIGHT_BYTES * sum(lines * inner for lines, inner in fused_widths(shape)))
    return shape.num_layers * (products_s + fused.layer_s(batch, weight_bytes)) + head_s + step_s


def linear_widths(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """(outputs, inputs) of a layer's linear layers, one by one: queries, keys, values, output, gate, up, down."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    return (q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (ffn, hidden), (ffn, hidden), (hidden, ffn)


def fused_widths(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """(lines of weights, inner columns) of a fused layer's products: queries with keys and values, output, gate with up, down."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    return (q + 2 * kv, hidden), (hidden, q), (2 * ffn, hidden), (hidden, ffn)


def parts_s(shape: ModelShape, costs: PartCosts, *, rows: int, last_rows: int) -> tuple[float, float]:
    """Seconds of the linear and of the pointwise parts: layers over `rows` tokens, the output layer over `last_rows`."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    pointwise = [
        ("norm", 2 * [hidden]),
        ("residual", 2 * [hidden]),
        ("rotation", [q, kv]),
        ("transpose", [q]),
        ("gate", [ffn]),
    ]
    if shape.qk_norm:
        pointwise.append(("norm", [q, kv]))
    linear_s = shape.num_layers * sum(costs.linear_s(rows, outputs, inputs) for outputs, inputs in linear_widths(shape))
    pointwise_s = sum(costs.pointwise_s(name, rows * width) for name, widths in pointwise for width in widths)
    return (
        linear_s + costs.linear_s(last_rows, shape.vocab_size, hidden),
        shape.num_layers * pointwise_s + costs.pointwise_s("norm", rows * hidden),
    )


def activation_bytes(shape: ModelShape, rows: int, dtype_bytes: int) -> float:
    """Largest intermediate results of prefill, as transformers' decoders hold them.

    Angles, the embedded tokens, a layer's input, what attention added to it, its norm; and beside them activated gate, up and their product.
    Or, if that is more, queries, keys and values before and after rotation, and the output, with one residual stream less.
    """
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    feed_forward = 4 * shape.hidden_size + 3 * shape.intermediate_size
    attention = 3 * shape.hidden_size + 3 * q + 4 * kv
    return float(rows * (2 * shape.head_dim + max(feed_forward, attention)) * dtype_bytes)
