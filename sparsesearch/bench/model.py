"""A whole model, end to end: prefill and decoding under a plan beside the strong dense baseline, in one run.

The bounds it is measured against:
    prefill   Amdahl: T = T_dense - A + density · A, A the measured seconds of cuDNN's attention in that same dense prefill
    decoding  bytes: weights read per step, and keys and values kept, over the copy bandwidth measured in the same run
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsesearch.bench.meter import allocated_bytes, emptied
from sparsesearch.bench.model_decode import measure_decode
from sparsesearch.bench.model_predicted import whole_model_costs, with_predictions
from sparsesearch.bench.model_prefill import measure_prefill
from sparsesearch.bench.model_session import Request, Session
from sparsesearch.bench.timing import ceilings, provenance
from sparsesearch.cost import CostModel
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.runtime.joined_linears import join_linears

FORMAT = "sparsesearch.bench.model"
__all__ = ["FORMAT", "Request", "run"]


def run(
    model: PreTrainedModel,
    plan: Plan,
    request: Request,
    *,
    cost_model: CostModel | None = None,
    command: list[str] | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure, and return rows, ceilings, provenance, and `other_bytes`: what lay in memory beside the weights before anything ran.

    Args:
        model: on the GPU that is measured; its linears are joined (`join_linears`), which all variants enjoy.
        plan: the plan beside dense.
        request: what to measure.
        cost_model: predicts time to first token and per step under the plan, once all is measured.
        command: recorded as the command line.
        progress: called with the record so far whenever a row is finished.

    Raises:
        SpecError: the model is not on a GPU, or the cost model cannot price it.
    """
    if model.device.type != "cuda":
        raise SpecError(f"the model must be on a GPU to be measured, but is on {model.device}. Pass --device cuda.")
    priced_by = None if cost_model is None else whole_model_costs(cost_model, plan)
    record: dict[str, Any] = {
        "format": FORMAT,
        "model": plan.base_model.name_or_path,
        "plan_sha256": plan.sha256,
        "rules": plan.kind_counts(),
        "provenance": provenance(command),
        "ceilings": ceilings(),
        "rows": [],
    }
    join_linears(model)
    emptied(model.device)
    record["other_bytes"] = allocated_bytes(model.device) - sum(weight.nbytes for weight in model.parameters())
    session = Session(model, plan, request, record, progress)
    with torch.inference_mode():
        for length in request.lengths:
            measure_prefill(session, length)
        if request.decode_tokens:
            measure_decode(session)
    if priced_by is None:
        return record
    costs, shape = priced_by
    return with_predictions(record, plan, shape, costs)
