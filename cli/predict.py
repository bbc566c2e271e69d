"""Command that predicts what a plan will take."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .errors import guarded, usage
from .render import emit_json, lines, table

if TYPE_CHECKING:
    from sparsesearch.cost.layer_calls import CallCosts
    from sparsesearch.cost.layer_costs import LayerCosts
    from sparsesearch.cost.predict import Prediction
    from sparsesearch.model_shapes import ModelShape
    from sparsesearch.plan import Plan

COLUMNS = [
    "",
    "density",
    "first token (ms)",
    "of it attention",
    "per token (ms)",
    "of it attention",
    "KV (GB)",
    "peak (GB)",
]


def predict(
    plan: o.PlanFile,
    workload: Annotated[
        list[str],
        typer.Option(help="What is served; several may be given.", metavar="prompt=32768,generate=512,batch=8"),
    ],
    device: Annotated[str, typer.Option(help="Cost model: h200, h100, roofline:b200 or a file.")],
    shape: Annotated[
        str | None,
        typer.Option("--model-shape", help="Sizes of the model, such as llama3-8b; the plan's own by default."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Predict a plan's time to first token, time per output token and memory on a device, beside dense."""
    from sparsesearch.cost import caveat
    from sparsesearch.cost.predict import predict as run
    from sparsesearch.errors import SpecError
    from sparsesearch.plan import Plan
    from sparsesearch.workload import parse_workloads

    opened = Plan.load(plan)
    if opened.pruning is not None:
        raise SpecError(
            f"{plan} must keep every weight to be predicted, but removes some. Apply it, and time the checkpoint with `sparsesearch bench model`."
        )
    with usage("--workload"):
        workloads = parse_workloads(workload)
    costs = _costs(device)
    sizes = _shape(opened, shape)
    found = [{"dense": run(None, sizes, each, costs), "plan": run(opened, sizes, each, costs)} for each in workloads]
    if json:
        head = {"plan": str(plan), "model_shape": sizes.name, "device": costs.device, "measured": costs.measured}
        pairs = zip(workloads, found, strict=True)
        rows = [{"workload": str(each)} | {name: _fields(one) for name, one in pair.items()} for each, pair in pairs]
        emit_json(head | {"workloads": rows})
        return
    for each, pair in zip(workloads, found, strict=True):
        table(f"{each} on {costs.device}, {sizes.name}", COLUMNS, [[name, *_row(one)] for name, one in pair.items()])
    lines(
        "Density is of tiles as this device's kernels cut them; dynamic rules choose from random queries and keys here."
    )
    if any(one.tpot_s is None and one.workload.generate_tokens for pair in found for one in pair.values()):
        lines("Of a decoded token, only the attention is known on a CPU; memory is cache alone.")
    if any(one.fused_step for pair in found for one in pair.values()):
        lines("Decoding is that of the fused step, dense and under the plan.")
    if unpriced := sorted({kind for pair in found for kind in pair["plan"].unpriced_choices}):
        lines(
            f"{costs.name} has no price for what {', '.join(unpriced)} choose while decoding: they are priced as reading every key."
        )
    if caveat(costs.name):
        lines(f"{costs.name}: {caveat(costs.name)}")


def _costs(device: str) -> "LayerCosts | CallCosts":
    from sparsesearch.cost import load_cost_model
    from sparsesearch.cost.layer_calls import CallCosts
    from sparsesearch.cost.layer_costs import LayerCosts
    from sparsesearch.errors import SpecError

    costs = load_cost_model(device)
    if isinstance(costs, CallCosts) and costs.prices_layers:
        return costs
    if not isinstance(costs, LayerCosts):
        raise SpecError(
            f"--device must name a cost model that knows whole layers, but {device!r} prices attention alone. Calibrate again, or pass h200."
        )
    return costs


def _shape(plan: "Plan", name: str | None) -> "ModelShape":
    from sparsesearch.errors import SpecError
    from sparsesearch.pricing import shape_of

    found = shape_of(plan.base_model, name)
    if found is None:
        raise SpecError(
            f"the sizes of {plan.base_model.name_or_path} must be known, but it is no local folder with a config.json. Pass --model-shape, such "
            "as llama3-8b."
        )
    return found


def _row(found: "Prediction") -> list[object]:
    step = None if found.tpot_s is None else found.tpot_s * 1e3
    attention = found.decode_attention_s * 1e3 if found.workload.generate_tokens else None
    peak = None if found.peak_bytes is None else found.peak_bytes / 1e9
    return [found.density, found.ttft_s * 1e3, found.attention_s * 1e3, step, attention, found.kv_bytes / 1e9, peak]


def _fields(found: "Prediction") -> dict[str, Any]:
    from dataclasses import asdict

    content = asdict(found)
    return {name: content[name] for name in content if name not in ("workload", "device", "measured")} | {
        "density": found.density
    }


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("predict")(guarded(predict))
