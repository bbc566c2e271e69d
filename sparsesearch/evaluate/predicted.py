"""What a cost model says of the variants that an evaluation times, so that every measured second stands beside its prediction."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.base import CostModel
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.cost.layer_parts import prefill_rest_s
from sparsesearch.cost.layer_schedule import choice_of
from sparsesearch.cost.predict import DENSE_BLOCK_TOKENS, predict_layers
from sparsesearch.errors import SpecError
from sparsesearch.model_shapes import ModelShape, heads_alone, shape_of_config
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.pricing import unit_work
from sparsesearch.rules import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.workload import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def predicted_seconds(
    model: "PreTrainedModel", variants: Mapping[str, Plan | None], length: int, costs: CostModel
) -> dict[str, dict[str, float]]:
    """Seconds of a prefill of one prompt, per variant: `attention_s`, and `prefill_s` where the cost model knows whole layers.

    Args:
        model: whose sizes count.
        variants: name -> plan; None is dense. At least one is a plan, which names the model's heads.
        length: tokens of the prompt.
        costs: of the device that is timed.

    Raises:
        SpecError: the cost model lacks something that a plan needs.
    """
    info = next((plan.base_model for plan in variants.values() if plan is not None), None)
    if info is None:
        return {}
    if not isinstance(costs, LayerCosts):
        return {name: {"attention_s": _summed_s(plan, info, length, costs)} for name, plan in variants.items()}
    whole = _shape(model, info)
    shape = whole or heads_alone(info.name_or_path, info.geometry)
    found = {}
    for name, plan in variants.items():
        layers = predict_layers(plan, shape, Workload(length), costs)
        attention_s = sum(layer.attention_s + layer.index_s for layer in layers)
        found[name] = {"attention_s": attention_s}
        if whole is not None:
            found[name]["prefill_s"] = attention_s + prefill_rest_s(whole, costs, rows=length, batch=1)
    return found


def _shape(model: "PreTrainedModel", info: BaseModelInfo) -> ModelShape | None:
    """Sizes of a gated decoder; None for a model of other parts."""
    try:
        shape = shape_of_config(model.config.to_dict(), info.name_or_path)
    except SpecError:
        return None
    heads = (shape.geometry.num_heads, shape.geometry.num_kv_heads, shape.geometry.head_dim)
    return shape if heads == (info.num_heads, info.num_kv_heads, info.head_dim) else None


def _summed_s(plan: Plan | None, info: BaseModelInfo, length: int, costs: CostModel) -> float:
    """Call by call, for a device that works on one call at a time: the heads of a layer that follow one rule share a call."""
    block_tokens = DENSE_BLOCK_TOKENS if plan is None else plan.block_tokens
    grid = BlockGrid(length, length, block_tokens)
    works = []
    for layer, module in enumerate(info.modules):
        heads: tuple[Rule, ...] = (Dense(),) * info.num_heads[layer] if plan is None else plan.module_rules(module)
        for rule in dict.fromkeys(heads):
            count = heads.count(rule)
            tiles = count * float(choice_of(rule, grid).sum())
            works.append(unit_work(rule, tiles, grid, info.head_dim[layer], count))
    return float(costs.latency_s(works).sum())
