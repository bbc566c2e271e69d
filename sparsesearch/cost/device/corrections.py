"""What whole layers took beside the sum of their parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from sparsesearch.cost.base import DecodeWork
from sparsesearch.cost.device.fused import MeasuredFused
from sparsesearch.cost.device.micro_bench import Row
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.run_plan import EVICTING, PROBE, PROBE_KV_TOKENS, SHORT
from sparsesearch.cost.device.table import Correction, ShortLayers
from sparsesearch.cost.device.tile_cases import TileCase
from sparsesearch.cost.layer_parts import fused_widths, parts_s
from sparsesearch.model_shapes import ModelShape


def corrections(model: DeviceCostModel, rows: Sequence[Row]) -> dict[str, Correction | ShortLayers]:
    """What the probe's whole layers took, beside the sum of their parts."""
    found: dict[str, Correction | ShortLayers] = {}
    prefills = sorted((row["tokens"], row["seconds"]) for row in group_of(rows, "layer_prefill"))
    if prefills:
        relief = []
        for tokens, seconds in prefills:
            case = TileCase("dense", tokens, PROBE.head_dim, num_heads=PROBE.num_heads, num_kv_heads=PROBE.num_kv_heads)
            schedule = case.schedule(model.workers, model.kernel, model.table.dtype_bytes)
            attention_s = model.attention_s(schedule, num_kv_heads=PROBE.num_kv_heads, head_dim=PROBE.head_dim)
            linear_s, pointwise_s = parts_s(PROBE, model, rows=tokens, last_rows=1)
            relief.append((PROBE.num_layers * attention_s + linear_s + pointwise_s - seconds) / pointwise_s)
        # one share for all lengths: a prompt's time differs by up to 6 % with the clock that the power limit happens to leave
        found["prefill_relief"] = _correction({1: median(relief)})
    probe = _ProbeCosts(model, {(row["m"], row["n"], row["k"]): row["seconds"] for row in group_of(rows, "probe_gemm")})
    return (
        found
        | _decode_corrections(probe, group_of(rows, "layer_decode"))
        | _fused_corrections(model, group_of(rows, "layer_fused"))
        | _turns(group_of(rows, "turn"), group_of(rows, "layer_fused"))
    )


@dataclass(frozen=True)
class _ProbeCosts:
    """A device's parts with the probes' linear layers as they were measured: the fit of other sizes must not be taken for gaps."""

    model: DeviceCostModel
    seconds: Mapping[tuple[int, int, int], float]

    def linear_s(self, rows: int, outputs: int, inputs: int) -> float:
        """A linear layer."""
        return self.seconds.get((rows, outputs, inputs)) or self.model.linear_s(rows, outputs, inputs)

    def pointwise_s(self, name: str, elements: float) -> float:
        """Norm, rotation, gate, residual or transpose."""
        return self.model.pointwise_s(name, elements)


def _decode_corrections(costs: _ProbeCosts, rows: Sequence[Row]) -> dict[str, Correction]:
    """Of every step measured, what its parts leave out: so much per step, the rest per layer."""
    beyond: dict[tuple[str, int], dict[int, float]] = {}
    shapes = {shape.name: shape for shape in (PROBE, EVICTING)}
    for row in rows:
        shape = replace(shapes[row["probe"]], num_layers=row["layers"])
        batch = row["batch"]
        parts = sum(parts_s(shape, costs, rows=batch, last_rows=batch)) + _attention_s(
            shape, costs.model, batch, PROBE_KV_TOKENS
        )
        beyond.setdefault((shape.name, shape.num_layers), {})[batch] = row["seconds"] - parts
    if not beyond:
        return {}
    layer, step = _per_layer({layers: own for (name, layers), own in beyond.items() if name == EVICTING.name})
    cached = {
        batch: (seconds - step[batch]) / PROBE.num_layers
        for batch, seconds in sorted(beyond[PROBE.name, PROBE.num_layers].items())
    }
    return {
        "decode_glue_s": _correction(cached),
        "decode_glue_evicting_s": _correction(layer),
        "decode_step_s": _correction(step),
    }


def _fused_corrections(model: DeviceCostModel, rows: Sequence[Row]) -> dict[str, Correction | ShortLayers]:
    """Likewise of the fused layers, long ones and short ones."""
    if not rows:
        return {}
    table = model.table
    none = Correction(amounts=(1.0,), values=(0.0,))
    products = MeasuredFused(table.skinny, table.dtype_bytes, layer=none, start=none)
    beyond: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        probe = SHORT if row.get("probe") == SHORT.name else EVICTING
        shape, batch = replace(probe, num_layers=row["layers"]), row["batch"]
        layer_s = sum(products.product_s(batch, lines, inner) for lines, inner in fused_widths(shape))
        kv_tokens = row.get("kv_tokens", PROBE_KV_TOKENS)
        parts = shape.num_layers * layer_s + _attention_s(shape, model, batch, kv_tokens)
        beyond.setdefault((probe.name, shape.num_layers), {})[batch] = row["seconds"] - parts
    layer, start = _per_layer({layers: own for (name, layers), own in beyond.items() if name == EVICTING.name})
    found: dict[str, Correction | ShortLayers] = {
        "fused_layer_s": _correction(layer),
        "fused_start_s": _correction(start),
    }
    for (name, layers), own in beyond.items():
        if name == SHORT.name:
            seconds = {batch: (own[batch] - start[batch]) / layers for batch in sorted(own)}
            sizes = [
                float(table.dtype_bytes * sum(n * k for n, k in fused_widths(probe))) for probe in (SHORT, EVICTING)
            ]
            found["fused_short"] = ShortLayers(
                weight_bytes=sizes[0], long_weight_bytes=sizes[1], seconds=_correction(seconds)
            )
    return found


def _turns(rows: Sequence[Row], steps: Sequence[Row]) -> dict[str, Correction | ShortLayers]:
    """What choosing tokens and starting the next step took beside the same step alone."""
    alone = {(row.get("probe"), row["layers"], row["batch"]): row["seconds"] for row in steps}
    beyond = {row["batch"]: max(0.0, row["seconds"] - alone[row["probe"], row["layers"], row["batch"]]) for row in rows}
    return {"decode_turn_s": _correction(beyond)} if beyond else {}


def _attention_s(shape: ModelShape, model: DeviceCostModel, batch: int, kv_tokens: int) -> float:
    """Of a probe's step."""
    group = shape.num_heads // shape.num_kv_heads
    head = DecodeWork(kv_tokens, shape.head_dim, group, batch, model.table.dtype_bytes)
    return shape.num_layers * model.decode_attention_s([head] * shape.num_kv_heads)


def _per_layer(beyond: Mapping[int, Mapping[int, float]]) -> tuple[dict[int, float], dict[int, float]]:
    """From what models of one and of many layers take beyond their parts: per layer, and once."""
    layers = max(beyond)
    many, one = beyond[layers], beyond[1]
    layer = {batch: (many[batch] - one[batch]) / (layers - 1) for batch in sorted(many)}
    return layer, {batch: one[batch] - layer[batch] for batch in layer}


def _correction(values: Mapping[int, float]) -> Correction:
    return Correction(amounts=tuple(values), values=tuple(values.values()))


def group_of(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows of one group."""
    return [row for row in rows if row["group"] == name]
