"""What a cost model says of a whole model under its plan, beside what was measured: time to first token, and time per step.

    python -m sparsesearch.bench.model_predicted record.json --cost-model h200 [--plan plan.json] [--density 0.15 --kv-fraction 0.25]

Puts predictions into a record of `sparsesearch bench model`, whose measurements stay; no device is needed. Dense prompts are predicted where
the device's own dense attention was measured. Left out are dense steps, whose attention is cuDNN's, and steps of compiled layers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sparsesearch.artifacts import canonical_json, read_text, write_bytes
from sparsesearch.bench.random_model import mixture_plan
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.base import CostModel
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.cost.layer_parts import decode_rest_s
from sparsesearch.cost.predict import predict, predict_layers
from sparsesearch.errors import PlanMismatchError, SpecError
from sparsesearch.model_shapes import ModelShape, model_shape
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.pricing import shape_of
from sparsesearch.workload import Workload


def whole_model_costs(costs: CostModel, plan: Plan) -> tuple[LayerCosts, ModelShape]:
    """The same cost model, and the sizes of the plan's model.

    Raises:
        SpecError: the cost model prices attention alone, or the sizes are unknown.
    """
    if not isinstance(costs, LayerCosts):
        raise SpecError(
            f"--cost-model must price whole layers, but {costs.name} prices attention alone. Pass h200 or h100."
        )
    shape = shape_of(plan.base_model)
    if shape is None:
        raise SpecError(
            f"the sizes of {plan.base_model.name_or_path} must be known to be priced, but it is no named shape and no folder with a "
            "config.json. Leave --cost-model out."
        )
    return costs, shape


def with_predictions(record: dict[str, Any], plan: Plan, shape: ModelShape, costs: LayerCosts) -> dict[str, Any]:
    """A record of `bench.model.run` with this cost model's predictions in it.

    A prefill gets `predicted_s` and the share of it that is attention, choosing included, `predicted_attention_s`, and dense's
    `predicted_dense_s`; the host's launches are left out, so short prompts compare with `plan_graph_s`. Also `predicted_peak_bytes` and
    `predicted_dense_peak_bytes`, to which the record's `other_bytes` come. A decoding step under the plan gets the first two, at its first
    token.

    Raises:
        PlanMismatchError: the record is of another plan.
    """
    if record["rules"] != plan.kind_counts():
        raise PlanMismatchError(
            f"the record must be of this plan, but counts {record['rules']} heads by rule and the plan {plan.kind_counts()}. Give its "
            "--plan, or --density and --kv-fraction."
        )
    measured = ({key: row[key] for key in row if not key.startswith("predicted")} for row in record["rows"])
    rows = [row | _predicted(row, plan, shape, costs) for row in measured]
    return record | {"rows": rows, "predicted_by": costs.name}


def _predicted(row: dict[str, Any], plan: Plan, shape: ModelShape, costs: LayerCosts) -> dict[str, float | None]:
    if row["phase"] == "prefill":
        prompt = Workload(row["length"])
        found = predict(plan, shape, prompt, costs)
        dense = predict(None, shape, prompt, costs)
        seconds: dict[str, float | None] = {"predicted_s": found.ttft_s, "predicted_attention_s": found.attention_s}
        if costs.own_dense_s(1.0, shape.head_dim) is not None:
            seconds["predicted_dense_s"] = dense.ttft_s
        return seconds | {"predicted_peak_bytes": found.peak_bytes, "predicted_dense_peak_bytes": dense.peak_bytes}
    if row["phase"] != "decode" or row["variant"] != "plan":
        return {}
    workload = Workload(row["tokens"], generate_tokens=1, batch=row["batch"])
    attention_s = sum(layer.decode_attention_s for layer in predict_layers(plan, shape, workload, costs))
    if row["compiled"] or (row["fused"] and costs.fused is None):
        return {"predicted_attention_s": attention_s}
    rest_s = decode_rest_s(shape, costs, batch=row["batch"], fused=row["fused"])
    return {"predicted_s": attention_s + rest_s, "predicted_attention_s": attention_s}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="what `sparsesearch bench model` wrote; the predictions go into it")
    parser.add_argument("--cost-model", required=True, help="shipped name or file")
    parser.add_argument("--plan", type=Path, help="the plan that was run; by default a mixture, as in `bench model`")
    parser.add_argument("--density", type=float, default=0.15, help="of the mixture")
    parser.add_argument("--kv-fraction", type=float, default=0.25, help="of the mixture")
    given = parser.parse_args()
    record = json.loads(read_text(given.record))
    if given.plan is None:
        plan = mixture_plan(base_model_of(record["model"]), density=given.density, kv_fraction=given.kv_fraction)
    else:
        plan = Plan.load(given.plan)
    costs, shape = whole_model_costs(load_cost_model(given.cost_model), plan)
    write_bytes(given.record, canonical_json(with_predictions(record, plan, shape, costs)).encode())


def base_model_of(name: str) -> BaseModelInfo:
    """The heads of a named shape, without weights."""
    return heads_of(model_shape(name))


def heads_of(shape: ModelShape) -> BaseModelInfo:
    """A model of that shape, without weights."""
    heads = shape.geometry
    return BaseModelInfo(
        name_or_path=shape.name,
        model_type=shape.model_type,
        modules=heads.modules,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
    )


if __name__ == "__main__":
    main()
