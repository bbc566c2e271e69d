"""What a cost model says of the variants that an evaluation times, so that every measured second stands beside its prediction."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsesearch.cost.base import CostModel
from sparsesearch.cost.layer_calls import CallCosts
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.cost.layer_parts import prefill_rest_s
from sparsesearch.cost.predict import predict_layers
from sparsesearch.errors import SpecError
from sparsesearch.model_shapes import ModelShape, heads_alone, shape_of_config
from sparsesearch.plan import BaseModelInfo, Plan
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
    if info is None or not isinstance(costs, (LayerCosts, CallCosts)):
        return {}
    whole = _shape(model, info) if isinstance(costs, LayerCosts) or costs.prices_layers else None
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
