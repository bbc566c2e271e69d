"""What a plan will take on a device: time to first token, time per output token, cache and peak memory, for a stated workload.

Prefill attention is priced from the exact tile list of every layer, dealt to the device's workers as the kernel will have it; on a processor,
as the calls that the layer makes. Layers whose heads are all dense run in the model's own attention, and are priced by what that was measured to
take. The rest of a layer is priced by shape (`layer_parts`). Decoding is priced as `DecodeStep` runs it, with and without a plan: fused where that serves.
Tokenisation, sampling and the host are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.base import DecodeWork
from sparsesearch.cost.layer_calls import CallCosts, calls_of, chooses
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.cost.layer_parts import activation_bytes, decode_rest_s, is_fused, prefill_rest_s
from sparsesearch.cost.layer_schedule import layer_schedule
from sparsesearch.cost.step_work import cached_tokens, head_works, step_choice
from sparsesearch.errors import PlanMismatchError
from sparsesearch.model_shapes import ModelShape
from sparsesearch.plan import Plan
from sparsesearch.rules import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.workload import Workload

DENSE_BLOCK_TOKENS = 128

LayerRules = tuple[tuple[Rule, ...], tuple[Rule, ...], tuple[Rule, ...]]
"""Of one layer's heads: their rules, the rules whose tiles they compute in prefill, and the rules they decode by."""


@dataclass(frozen=True)
class LayerPrediction:
    """One layer.

    Attributes:
        density: computed tiles over dense attention's, in prefill.
        attention_s: prefill attention.
        index_s: choosing tiles, for dynamic rules.
        decode_attention_s: decoding attention per step, halfway through the generated tokens.
        kv_bytes: cache after the last token, with the bounds of blocks where a rule asks for them.
        module: its attention module.
        step_choices: kinds of its rules that choose for every decoded token.
    """

    density: float
    attention_s: float
    index_s: float
    decode_attention_s: float = 0.0
    kv_bytes: float = 0.0
    module: str = ""
    step_choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """A workload on a device, under a plan or dense.

    Attributes:
        workload: what is served.
        device: product.
        measured: False if nobody has measured this device; `cost.caveat` says what stands for it.
        ttft_s: time to first token, the whole batch prefilled at once.
        tpot_s: time per output token, halfway through the generated ones; None if none is generated, or on a CPU, where only the attention of
            a step is known.
        attention_s: the share of `ttft_s` that is attention, choosing included.
        decode_attention_s: the share of `tpot_s` that is attention.
        kv_bytes: cache after the last token.
        weight_bytes: parameters.
        fused_step: whether `tpot_s` is that of the fused step.
        peak_bytes: weights, cache and the largest activations of prefill; None on a CPU.
        layers: layer by layer.
        unpriced_choices: kinds of rules that choose while decoding but have no price on this device: `tpot_s` has them read every key.
    """

    workload: Workload
    device: str
    measured: bool
    ttft_s: float
    tpot_s: float | None
    attention_s: float
    decode_attention_s: float
    kv_bytes: float
    weight_bytes: float
    fused_step: bool
    peak_bytes: float | None
    layers: tuple[LayerPrediction, ...]
    unpriced_choices: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """Mean over layers."""
        return sum(layer.density for layer in self.layers) / len(self.layers)


def predict(
    plan: Plan | None,
    shape: ModelShape,
    workload: Workload,
    costs: LayerCosts | CallCosts,
    *,
    dtype_bytes: int | None = None,
) -> Prediction:
    """Price a workload.

    Args:
        plan: None is dense.
        shape: the model's sizes.
        workload: prompt, generated tokens, batch.
        costs: the device.
        dtype_bytes: of weights, activations and cache; by default 2, or what was measured on a CPU.

    Raises:
        PlanMismatchError: plan and shape have different heads.
        SpecError: the device's model lacks something the plan needs.
    """
    steps = costs if isinstance(costs, LayerCosts) else None
    if dtype_bytes is None:
        dtype_bytes = costs.dtype_bytes if isinstance(costs, CallCosts) else 2
    layers = predict_layers(plan, shape, workload, costs, dtype_bytes=dtype_bytes)
    tokens = workload.batch * workload.prompt_tokens
    attention_s = sum(layer.attention_s + layer.index_s for layer in layers)
    decode_s = sum(layer.decode_attention_s for layer in layers)
    other_s = prefill_rest_s(shape, costs, rows=tokens, batch=workload.batch)
    step_s = None if steps is None else decode_s + decode_rest_s(shape, steps, batch=workload.batch)
    kv_bytes = sum(layer.kv_bytes for layer in layers)
    weight_bytes = float(shape.num_parameters * dtype_bytes)
    return Prediction(
        workload=workload,
        device=costs.device,
        measured=costs.measured,
        ttft_s=attention_s + other_s,
        tpot_s=step_s if workload.generate_tokens else None,
        attention_s=attention_s,
        decode_attention_s=decode_s,
        kv_bytes=kv_bytes,
        weight_bytes=weight_bytes,
        fused_step=steps is not None and workload.generate_tokens > 0 and is_fused(shape, steps, workload.batch),
        peak_bytes=None if steps is None else weight_bytes + kv_bytes + activation_bytes(shape, tokens, dtype_bytes),
        layers=layers,
        unpriced_choices=tuple(sorted({kind for one in layers for kind in one.step_choices} - costs.step_choices)),
    )


def predict_layers(
    plan: Plan | None, shape: ModelShape, workload: Workload, costs: LayerCosts | CallCosts, *, dtype_bytes: int = 2
) -> tuple[LayerPrediction, ...]:
    """The attention of every layer; arguments and errors as in `predict`. Of the shape, only its heads count."""
    rules, decode_rules = _rules_of(plan, shape), _rules_of(plan, shape, decode=True)
    tile_rules = [
        tuple(_source(rules, layer, head) for head in range(shape.num_heads)) for layer in range(shape.num_layers)
    ]
    block_tokens = DENSE_BLOCK_TOKENS if plan is None else plan.block_tokens
    known: dict[LayerRules, LayerPrediction] = {}  # many layers are alike
    for heads in zip(rules, tile_rules, decode_rules, strict=True):
        if heads not in known:
            known[heads] = _layer(heads, block_tokens, shape, workload, costs, dtype_bytes)
    of_layer = zip(rules, tile_rules, decode_rules, strict=True)
    return tuple(
        replace(known[heads], module=module) for module, heads in zip(shape.geometry.modules, of_layer, strict=True)
    )


def _layer(
    heads: LayerRules,
    block_tokens: int,
    shape: ModelShape,
    workload: Workload,
    costs: LayerCosts | CallCosts,
    dtype_bytes: int,
) -> LayerPrediction:
    rules, tile_rules, decode_rules = heads
    if all(rule.kind == "dense" for rule in rules):
        block_tokens = DENSE_BLOCK_TOKENS  # the runtime leaves such a layer to the model's own attention
    halfway = workload.prompt_tokens + -(-workload.generate_tokens // 2)
    step = decode_works(decode_rules, block_tokens, shape, workload, halfway, dtype_bytes)
    if isinstance(costs, LayerCosts):
        prefill = _scheduled(rules, tile_rules, block_tokens, shape, workload, costs)
    else:
        prefill = _called(rules, tile_rules, block_tokens, shape, workload, costs)
    return replace(
        prefill,
        decode_attention_s=_step_s(costs, step) if workload.generate_tokens else 0.0,
        kv_bytes=_cache_bytes(decode_rules, block_tokens, shape, workload, dtype_bytes),
        step_choices=_choice_names(decode_rules, block_tokens, workload),
    )


def _scheduled(
    rules: tuple[Rule, ...],
    tile_rules: tuple[Rule, ...],
    block_tokens: int,
    shape: ModelShape,
    workload: Workload,
    costs: LayerCosts,
) -> LayerPrediction:
    """A prefill in one launch for all heads, or in the model's own attention where all are dense."""
    schedule, repeats = layer_schedule(tile_rules, block_tokens, shape, workload, costs)
    attention_s = repeats * costs.attention_s(schedule, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim)
    if all(rule.kind == "dense" for rule in rules):
        pairs = workload.batch * shape.num_heads * workload.prompt_tokens * (workload.prompt_tokens + 1) / 2
        # the replay knows that few heads leave workers idle, the curve how much longer PyTorch's kernel takes
        attention_s = max(attention_s, costs.own_dense_s(pairs, shape.head_dim) or 0.0)
    mean_heads = sum(rule.rest == "mean_value" for rule in rules)
    if mean_heads:
        elements = 2 * workload.batch * workload.prompt_tokens * mean_heads * shape.head_dim
        attention_s += costs.pointwise_s("transpose", elements)
    grid = BlockGrid(workload.prompt_tokens, workload.prompt_tokens, block_tokens)
    choosing = [rule.kind for rule in rules if chooses(rule, grid)]
    index_s = sum(
        costs.estimator_s(kind, workload.prompt_tokens, workload.batch * choosing.count(kind))
        for kind in sorted(set(choosing))
    )
    return LayerPrediction(schedule.density, attention_s, index_s)


def _called(
    rules: tuple[Rule, ...],
    tile_rules: tuple[Rule, ...],
    block_tokens: int,
    shape: ModelShape,
    workload: Workload,
    costs: CallCosts,
) -> LayerPrediction:
    """A prefill in one call per rule and sequence."""
    grid = BlockGrid(workload.prompt_tokens, workload.prompt_tokens, block_tokens)
    calls = calls_of(rules, tile_rules, grid, shape.head_dim)
    dense = len(rules) * float(grid.reachable().sum())
    whole_s, static_s = (
        workload.batch * sum(costs.call_latency_s(call) for call in own)
        for own in (calls, [replace(call, estimator=None) for call in calls])
    )
    return LayerPrediction(sum(call.tiles for call in calls) / dense, static_s, whole_s - static_s)


def _step_s(costs: LayerCosts | CallCosts, works: tuple[DecodeWork, ...]) -> float:
    if isinstance(costs, LayerCosts):
        return costs.decode_attention_s(works)
    return costs.decode_call_s + float(costs.decode_latency_s(works).sum())


def decode_works(
    rules: tuple[Rule, ...], block_tokens: int, shape: ModelShape, workload: Workload, context: int, dtype_bytes: int
) -> tuple[DecodeWork, ...]:
    """What each KV head reads in the step whose last token is number `context`: see `step_work.head_works`."""
    grid = BlockGrid(1, context, block_tokens, law_len=workload.prompt_tokens)
    sizes = {"head_dim": shape.head_dim, "batch": workload.batch, "dtype_bytes": dtype_bytes}
    return tuple(work for own in _by_kv_head(rules, shape) for work in head_works(own, grid, **sizes))


def _cache_bytes(
    rules: tuple[Rule, ...], block_tokens: int, shape: ModelShape, workload: Workload, dtype_bytes: int
) -> float:
    """What the layer's cache holds after the last token."""
    grid = BlockGrid(1, workload.last_context_tokens, block_tokens, law_len=workload.prompt_tokens)
    tokens = sum(cached_tokens(own, grid) for own in _by_kv_head(rules, shape))
    return 2.0 * tokens * shape.head_dim * workload.batch * dtype_bytes


def _choice_names(rules: tuple[Rule, ...], block_tokens: int, workload: Workload) -> tuple[str, ...]:
    if not workload.generate_tokens:
        return ()
    grid = BlockGrid(1, workload.last_context_tokens, block_tokens, law_len=workload.prompt_tokens)
    return tuple(sorted({rule.kind for rule in rules if step_choice(rule, grid) is not None}))


def _by_kv_head(rules: tuple[Rule, ...], shape: ModelShape) -> list[tuple[Rule, ...]]:
    group = shape.num_heads // shape.num_kv_heads
    return [rules[first : first + group] for first in range(0, shape.num_heads, group)]


def _source(rules: Sequence[tuple[Rule, ...]], layer: int, head: int) -> Rule:
    """The rule whose tiles a head computes: its own, or where it reuses another's, that one's."""
    rule = rules[layer][head]
    found = rule.source_head(head)
    return rule if found is None else _source(rules, *found)


def _rules_of(plan: Plan | None, shape: ModelShape, *, decode: bool = False) -> list[tuple[Rule, ...]]:
    geometry = shape.geometry
    if plan is None:
        return [(Dense(),) * shape.num_heads] * shape.num_layers
    planned = (
        replace(plan.base_model.geometry, modules=geometry.modules)
        if len(plan.base_model.modules) == shape.num_layers
        else None
    )
    if planned != geometry:
        raise PlanMismatchError(
            f"the plan's model must have {shape.num_layers} layers of {shape.num_heads} heads, {shape.num_kv_heads} of them KV heads, of "
            f"{shape.head_dim}, as {shape.name} has, but is {plan.base_model.name_or_path}. Name the shape of the plan's own model."
        )
    rule_of = plan.decode_rule if decode else plan.rule
    return [tuple(rule_of(module, head) for head in range(shape.num_heads)) for module in plan.base_model.modules]
