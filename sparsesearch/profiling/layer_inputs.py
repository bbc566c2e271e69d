"""What scoring needs of a layer: recorded calls with their gradients, and the tiles that candidates choose there."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsesearch.block_mask import BlockGrid
from sparsesearch.calibration import Sample
from sparsesearch.profiling.capture import AttentionCall, logits_and_calls
from sparsesearch.profiling.layer_scores import LayerInput
from sparsesearch.profiling.losses import SampleGradients, sample_gradients
from sparsesearch.profiling.projection import projection_gram
from sparsesearch.profiling.tile_scores import choose_tiles, static_tiles
from sparsesearch.rules import Rule

Calibrated = dict[str, dict[str, tuple[Rule, ...]]]
"""Template's label -> module -> its rule in every head."""


def swept_input(call: AttentionCall, gradients: Float[Tensor, "K S H D"], sample: Sample) -> LayerInput:
    """What scoring needs of one layer, from the backward sweep: probes first, then the two answer losses."""
    generated = sample.answer_mask if sample.answer_mask.any() else None
    return layer_input(call, list(gradients[:-2]), gradients[-2], gradients[-1], generated=generated)


def calls_and_gradients(
    model: PreTrainedModel, sample: Sample, *, num_probes: int, seed: int
) -> tuple[list[AttentionCall], SampleGradients]:
    """Run one sequence forward and every loss backward through one graph."""
    logits, calls = logits_and_calls(model, sample.input_ids)
    gradients = sample_gradients(
        logits,
        [call.out for call in calls],
        sample.input_ids,
        sample.answer_mask,
        num_probes=num_probes,
        generator=torch.Generator(device=logits.device).manual_seed(seed),
    )
    return calls, gradients


def layer_inputs(model: PreTrainedModel, sample: Sample, *, num_probes: int, seed: int) -> list[LayerInput]:
    """What scoring needs of every layer, from one sweep."""
    calls, gradients = calls_and_gradients(model, sample, num_probes=num_probes, seed=seed)
    generated = sample.answer_mask if sample.answer_mask.any() else None
    return [
        layer_input(
            call,
            [probe[layer] for probe in gradients.fisher],
            gradients.answer[layer],
            gradients.answer_ce[layer],
            generated=generated,
        )
        for layer, call in enumerate(calls)
    ]


def layer_input(
    call: AttentionCall,
    probes: Sequence[Float[Tensor, "S H D"]],
    answer: Float[Tensor, "S H D"],
    answer_ce: Float[Tensor, "S H D"],
    *,
    generated: Bool[Tensor, " S"] | None = None,
) -> LayerInput:
    """A recorded call and its gradients, as scoring wants them."""
    return LayerInput(
        q=call.q,
        k=repeated(call)[1],
        v=call.v.repeat_interleave(call.q.shape[0] // call.v.shape[0], 0),
        probes=torch.stack([gradient.transpose(0, 1) for gradient in probes]),
        answer=answer.transpose(0, 1),
        answer_ce=answer_ce.transpose(0, 1),
        projection_gram=projection_gram(call.module, call.q.shape[0]),
        sliding_window=call.sliding_window,
        num_kv_heads=call.k.shape[0],
        generated=None if generated is None else generated.to(call.q.device),
    )


def head_tiles(
    candidates: Sequence[Rule], calibrated: Calibrated, module: str, layer: LayerInput, grid: BlockGrid
) -> Tensor:
    """Each candidate's tiles in each head [H C N N], templates replaced by the head's own rule."""
    heads, device = layer.q.shape[0], layer.q.device
    per_head = {label: rules[module] for label, rules in calibrated.items()}
    plain = [rule for rule in candidates if not rule.needs_calibration]
    chosen = iter(choose_tiles(plain, layer, grid).unbind(1))
    columns = [
        torch.stack([static_tiles(per_head[rule.label][head], grid, device) for head in range(heads)])
        if rule.needs_calibration
        else next(chosen)
        for rule in candidates
    ]
    return torch.stack(columns, 1)


def repeated(call: AttentionCall) -> tuple[Float[Tensor, "H S D"], Float[Tensor, "H S D"]]:
    """Queries, and the keys that each query head sees."""
    return call.q, call.k.repeat_interleave(call.q.shape[0] // call.k.shape[0], 0)
