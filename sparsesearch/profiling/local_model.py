"""The loss around a plan: what changing one unit's rule would do, given what all the others run now.

The additive proxies are taken around dense. Once a plan skips much, errors interact; so the model is run under the plan and its true
loss is expanded there to second order. For unit u with rule c instead of its present one, Δ = O_c - O_now:

    J(c) - J(now)  ≈  Σ_n g_n·Δ_n  +  ½ E_probes[(Σ_n p_n·Δ_n)²],

g the gradient of J under the plan, p Fisher probes weighted like J. Around dense g vanishes and this is the text proxy again. A few sequences
estimate both terms, and a search over many candidates finds the lucky ones: both are steadied (`moderation`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from transformers import PreTrainedModel

from sparsesearch.block_mask import BlockGrid
from sparsesearch.calibration import Sample
from sparsesearch.plan import Plan
from sparsesearch.profiling.capture import logits_and_calls
from sparsesearch.profiling.layer_inputs import head_tiles, layer_input
from sparsesearch.profiling.moderation import moderated, shrunk
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import frozen
from sparsesearch.profiling.tile_scores import score_layer
from sparsesearch.rules import Rule
from sparsesearch.runtime.live import AppliedPlan, apply
from sparsesearch.shapes import Granularity

# J: mean KL to dense over all positions plus 0.1 x mean KL over answer positions, nats. Why 0.1: on needle-7m a plan that loses its answers has
# a text KL of some 0.05 and an answer KL of some 3 nats; with this weight both move J by the same order, and neither hides the other.
ANSWER_KL_WEIGHT = 0.1


@dataclass(frozen=True)
class LossAround:
    """J(c) - J(now) for every unit and candidate, averaged over samples; 0 at the present choice."""

    change: Float[ndarray, "U C"]


def loss_around(
    model: PreTrainedModel,
    plan: Plan,
    choice: Sequence[int],
    profile: Profile,
    samples: Sequence[Sample],
    granularity: Granularity,
    *,
    columns: Sequence[int] | None = None,
    answer_weight: float = 1.0,
    num_probes: int = 4,
    seed: int = 0,
) -> LossAround:
    """Expand J around a plan.

    Args:
        model: dense outside; the plan is applied here.
        plan: what runs.
        choice: the same plan as candidate indices per unit.
        profile: candidates and calibrated rules.
        samples: sequences to average over.
        granularity: what a unit is.
        columns: the candidates that are scored, as indices into the profile's, and what `choice` counts in; None: all of them.
        answer_weight: of the KL at answers, beside ANSWER_KL_WEIGHT.
        num_probes: Fisher probes per sequence.
        seed: of the probes.
    """
    rules = profile.manifest.candidates
    scored = rules if columns is None else tuple(rules[column] for column in columns)
    per_head = _per_head(profile, choice, granularity)
    per_layer: list[list[_Products]] = [[] for _ in profile.manifest.base_model.modules]
    applied = apply(model, plan, allow_other_weights=True)  # once for all sequences, which share its schedules
    applied.remove()
    for index, sample in enumerate(samples):
        weight = _weight(sample, answer_weight)
        found = _products(applied, per_head, profile, scored, sample, weight, num_probes, seed + index)
        for layer, products in enumerate(found):
            per_layer[layer].append(products)
    rows = []
    for layer, of_samples in enumerate(per_layer):
        heads = of_samples[0].error.shape[0]
        groups = heads if granularity == "query_head" else profile.manifest.base_model.num_kv_heads[layer]

        def per_unit(x: Float[Tensor, "... H C"], split: tuple[int, int] = (groups, heads // groups)) -> Tensor:
            summed: Tensor = x.unflatten(-2, split).sum(-2)
            return summed

        slopes = per_unit(torch.stack([found.of_gradient for found in of_samples]))
        squares = per_unit(torch.stack([found.of_probes for found in of_samples])).square().mean((0, 1))
        error = per_unit(torch.stack([found.error for found in of_samples])).mean(0)
        errors = error.double().numpy()
        curvature = moderated(squares.double().numpy(), errors, len(of_samples) * num_probes)
        rows.append(shrunk(slopes.double().numpy(), errors) + curvature / 2)
    return LossAround(np.concatenate(rows))


@dataclass(frozen=True)
class _Products:
    """One layer of one sequence: every candidate's change times the gradient of J and times the probes, and its energy behind the projection."""

    of_gradient: Float[Tensor, "H C"]
    of_probes: Float[Tensor, "R H C"]
    error: Float[Tensor, "H C"]


def _products(
    applied: AppliedPlan,
    per_head: list[list[int]],
    profile: Profile,
    scored: Sequence[Rule],
    sample: Sample,
    weight: Float[Tensor, " S"],
    num_probes: int,
    seed: int,
) -> list[_Products]:
    """One sequence, layer by layer."""
    length, model = len(sample.input_ids), applied.model
    grid = BlockGrid(length, length, profile.manifest.block_tokens)
    with frozen(model):
        with torch.no_grad():
            dense = model(input_ids=sample.input_ids[None].to(model.device), use_cache=False).logits[0].float()
        with applied:
            logits, calls = logits_and_calls(model, sample.input_ids)
            scalars = _scalars(dense.log_softmax(-1), logits.float().log_softmax(-1), weight, num_probes, seed)
            outputs = [call.out for call in calls]
            gradients = [
                torch.autograd.grad(scalar, outputs, retain_graph=index + 1 < len(scalars))
                for index, scalar in enumerate(scalars)
            ]
    found = []
    for layer, (module, call) in enumerate(zip(profile.manifest.base_model.modules, calls, strict=True)):
        own = [gradient[layer][0].float() for gradient in gradients]
        inputs = layer_input(call, own, own[0], own[0])
        tiles = head_tiles(scored, profile.manifest.calibrated, module, inputs, grid)
        now = torch.tensor(per_head[layer], device=tiles.device)
        scores = score_layer(scored, tiles, inputs, grid, now)
        of_gradient, *of_probes = scores.fisher.cpu()
        found.append(_Products(of_gradient, torch.stack(of_probes), scores.output_error.cpu()))
    return found


def _weight(sample: Sample, answer_weight: float) -> Float[Tensor, " S"]:
    """How much the KL at every position counts in J."""
    positions = sample.answer_mask.nonzero()[:, 0] - 1
    weight = torch.full((len(sample.input_ids),), 1 / len(sample.input_ids))
    if len(positions):
        weight[positions] += ANSWER_KL_WEIGHT * answer_weight / len(positions)
    return weight


def _scalars(
    dense: Float[Tensor, "S V"],
    sparse: Float[Tensor, "S V"],
    weight: Float[Tensor, " S"],
    num_probes: int,
    seed: int,
) -> list[Tensor]:
    """J of one sequence, and probes whose mean square is its curvature."""
    weight = weight.to(sparse.device)
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    generator = torch.Generator(device=sparse.device).manual_seed(seed)
    labels = torch.multinomial(sparse.detach().exp(), num_probes, replacement=True, generator=generator)
    signs = torch.randint(0, 2, labels.shape, generator=generator, device=labels.device) * 2 - 1
    drawn = sparse.gather(-1, labels) * signs * weight.sqrt()[:, None]
    return [(weight * kl).sum(), *drawn.sum(0)]


def _per_head(profile: Profile, choice: Sequence[int], granularity: Granularity) -> list[list[int]]:
    """Candidate index of every query head, per layer."""
    info = profile.manifest.base_model
    remaining = iter(np.asarray(choice).tolist())
    layers = []
    for num_heads, num_kv_heads in zip(info.num_heads, info.num_kv_heads, strict=True):
        size = 1 if granularity == "query_head" else num_heads // num_kv_heads
        layers.append([candidate for _ in range(num_heads // size) for candidate in [next(remaining)] * size])
    return layers
