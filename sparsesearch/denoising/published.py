"""Plans as published methods make them, without a search: SparseD, AdaSpa, and the least error of a few rules (SVG's choice, taken offline)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.denoising.planning import write_step_plan
from sparsesearch.errors import SpecError, nearest
from sparsesearch.layout import Layout
from sparsesearch.plan import BaseModelInfo, Plan, uniform_plan
from sparsesearch.profiling.denoising.menu import FlatCall, video_grid
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.profiling.denoising.run import Sampler
from sparsesearch.rules import Rule
from sparsesearch.rules.block_mass import BlockMass, head_sparsities, tile_mass
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.denoisers import apply_denoiser
from sparsesearch.runtime.diffusion.attention import LayerCall
from sparsesearch.step_schedule import StepSchedule


def sparsed_plan(
    base_model: BaseModelInfo,
    *,
    num_steps: int,
    layout: Layout,
    keep: float = 0.3,
    skip: float = 0.2,
    block_tokens: int = 128,
) -> Plan:
    """Dense up to step ⌊skip·n⌋; there each head chooses its tiles by exact mass, prompt and generation apart, and keeps them to the end.

    Source: Wang et al. 2025, SparseD, arXiv:2509.24014, section 4 and public code (keep 0.3 in blocks of 128, 0.5 in blocks of 32 for short
    contexts). Differs: ⌈keep·n⌉ tiles of each segment and not ⌊keep·n⌋ + 1; the diagonal is kept; the scale is 1/√head_dim (one of the published
    models is scaled by 1/√heads).

    Raises:
        SpecError: no step is left for the sparse part.
    """
    first = int(num_steps * skip) + 1
    if first >= num_steps:
        raise SpecError(f"skip must leave a sparse step among {num_steps}, but is {skip}. Take fewer dense steps.")
    rule = BlockMass(keep=keep, per_segment=True)
    table = {m: (rule.label,) * n for m, n in zip(base_model.modules, base_model.num_heads, strict=True)}
    return _scheduled(base_model, [rule], table, first, num_steps, (first,), layout, block_tokens)


def adaspa_plan(
    model: Any,
    sampler: Sampler,
    base_model: BaseModelInfo,
    *,
    num_steps: int,
    sparsity: float = 0.8,
    refresh: Sequence[int] = (10, 30),
    block_tokens: int = 64,
) -> Plan:
    """Dense up to the first refresh step; from there each head keeps its heaviest tiles, chosen anew at the refresh steps only.

    Heads of a layer have one of three sparsities, by how much of their attention the common one would keep at the first refresh step of a
    dense run of the sampler: see `rules.block_mass.head_sparsities`.

    Source: Xia et al. 2025, AdaSpa, arXiv:2502.21079, section 4 (sparsity 0.8, block 64, refresh at 10 and 30 of 50 steps). Differs: the recall
    is measured beforehand on calibration inputs, and not in each run.

    Raises:
        SpecError: the sampler never comes to the first refresh step, or the sparsity is below 1/3.
    """
    rule = BlockMass(keep=1 - sparsity)
    recalls: dict[str, list[Float[Tensor, " H"]]] = {module: [] for module in base_model.modules}
    seen_layout: list[Layout] = []

    def probe(seen: LayerCall) -> None:
        if seen.call.step is not None and seen.call.step[0] == refresh[0]:
            recalls[seen.path].append(_recall(rule, seen, block_tokens))
            seen_layout.append(seen.call.layout)

    with apply_denoiser(model, uniform_plan(base_model, Dense(), block_tokens=block_tokens, lengths_tokens=(1,))) as on:
        on.probe(probe)
        sampler()
    if not seen_layout:
        raise SpecError(
            f"the sampler must come to step {refresh[0]} and tell its steps, but did not. Name earlier refresh steps."
        )
    rules: dict[float, Rule] = {}
    table = {}
    for module, found in recalls.items():
        shares = head_sparsities(torch.stack(found).mean(0), sparsity)
        keeps = [round(1 - float(share), 6) for share in shares]
        rules |= {keep: BlockMass(keep=keep) for keep in keeps}
        table[module] = tuple(rules[keep].label for keep in keeps)
    return _scheduled(
        base_model, list(rules.values()), table, refresh[0], num_steps, tuple(refresh), seen_layout[0], block_tokens
    )


def least_error_plan(profile: DenoisingProfile, labels: Sequence[str]) -> Plan:
    """Every head takes that one of a few rules whose profiled error is least, in every range of steps.

    With a spatial and a temporal band of one density this is Sparse VideoGen's choice (Xi et al. 2025, arXiv:2502.01776, section 4.2: least
    mean square error of the two). Differs: on calibration inputs and all queries, and not on 32 sampled queries of each run.

    Raises:
        SpecError: a rule was not profiled.
    """
    known = [rule.label for rule in profile.manifest.candidates]
    for label in labels:
        if label not in known:
            raise SpecError(f"the profile must have scored {label}, but did not.{nearest(label, known)}")
    columns = np.array([known.index(label) for label in labels])
    errors = profile.error[..., torch.as_tensor(columns)].flatten(0, 2)
    return write_step_plan(
        profile, columns[errors.argmin(-1).numpy()], density=1.0, provenance={"objective": "least error per head"}
    )


def _recall(rule: BlockMass, seen: LayerCall, block_tokens: int) -> Float[Tensor, " H"]:
    """Share of each head's attention that the rule's tiles hold, mean over the sequences."""
    batch, heads = seen.q.shape[:2]
    q, k, _ = FlatCall.of(seen).ordered(rule.token_order)
    grid = video_grid(seen.call.layout, block_tokens)
    mass, tiles = tile_mass(q * seen.scale, k, grid), rule.select(grid, q * seen.scale, k)
    share = (mass * tiles).sum((-1, -2)) / mass.sum((-1, -2))
    return share.view(batch, heads).mean(0).cpu()


def _scheduled(
    base_model: BaseModelInfo,
    rules: Sequence[Rule],
    table: dict[str, tuple[str, ...]],
    first: int,
    num_steps: int,
    refresh: tuple[int, ...],
    layout: Layout,
    block_tokens: int,
) -> Plan:
    return Plan(
        base_model=base_model,
        block_tokens=block_tokens,
        unit="query_head",
        lengths_tokens=(layout.num_tokens,),
        rules={rule.label: rule for rule in rules},
        assignments={},
        schedule=StepSchedule.of(num_steps, [(first, num_steps, table)], refresh),
        layout=layout,
    )
