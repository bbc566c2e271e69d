"""Plans as published methods make them, without a search: SparseD, AdaSpa, Light Forcing, and SVG's least error of a few rules, taken offline."""

import math
from collections.abc import Mapping, Sequence
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
from sparsesearch.profiling.denoising.observe import Sampler
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.rules import Rule
from sparsesearch.rules.block_mass import BlockMass, head_sparsities, tile_mass
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.frame_topk import FrameTopk
from sparsesearch.runtime.denoisers import apply_denoiser
from sparsesearch.runtime.diffusion.attention import LayerCall
from sparsesearch.step_schedule import StepSchedule, chunk_densities


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
    schedule = StepSchedule.of(num_steps, [(first, num_steps, table)], (first,))
    return _scheduled(base_model, [rule], schedule, layout, block_tokens)


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
    schedule = StepSchedule.of(num_steps, [(refresh[0], num_steps, table)], tuple(refresh))
    return _scheduled(base_model, list(rules.values()), schedule, seen_layout[0], block_tokens)


def light_forcing_plan(
    base_model: BaseModelInfo,
    *,
    num_steps: int,
    num_chunks: int,
    density: float,
    least: float,
    layout: Layout,
    decay: float = 1.0,
    frames: int = 4,
    block_tokens: int = 64,
) -> Plan:
    """Chunk 0 dense; chunk c keeps the best blocks of the best frames, by `chunk_densities`; chunks past the last named one as that one.

    Source: Lv et al. 2026, Light Forcing, arXiv:2602.04789; how it differs stands at `FrameTopk` and `chunk_densities`. The runtime is told the
    chunk with `at_chunk`.

    Raises:
        SpecError: the density cannot be reached, or there is one chunk only.
    """
    if num_chunks < 2:
        raise SpecError(f"budgets per chunk need at least 2 chunks, but there is {num_chunks}.")
    densities = chunk_densities(num_chunks, density, least=least, decay=decay)
    rules = [FrameTopk(keep=round(share, 6), frames=frames) for share in densities[1:]]
    tables = [
        {m: (rule.label,) * n for m, n in zip(base_model.modules, base_model.num_heads, strict=True)} for rule in rules
    ]
    chunks = [(c + 1, c + 2 if c + 2 < num_chunks else None) for c in range(len(rules))]
    schedule = StepSchedule.of(num_steps, [(0, num_steps, table) for table in tables], chunks=chunks)
    return _scheduled(base_model, rules, schedule, layout, block_tokens)


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


def with_dense(
    plan: Plan, *, first_share: float = 0.0, layers: Sequence[int] = (), num_steps: int | None = None
) -> Plan:
    """The plan with the first steps dense, and some layers at all steps: what most published methods begin with.

    Args:
        plan: any plan; one with a schedule keeps its own number of steps.
        first_share: share of the steps that are dense, rounded up; 0.2 is Sparse VideoGen's on Wan.
        layers: indices of attention modules that are always dense.
        num_steps: of the trajectory, for a plan without a schedule.

    Raises:
        SpecError: a layer or share is out of range, or the number of steps is missing.
    """
    modules = plan.base_model.modules
    wrong = [layer for layer in layers if not 0 <= layer < len(modules)]
    if wrong or not 0 <= first_share < 1:
        raise SpecError(
            f"layers must lie in 0 to {len(modules) - 1} and the dense share in [0, 1), but got {list(layers)} and {first_share}."
        )
    steps = num_steps if plan.schedule is None else plan.schedule.num_steps
    if steps is None:
        raise SpecError("a plan without a schedule must be told the number of steps. Pass num_steps=….")
    first, dense = math.ceil(first_share * steps - 1e-9), {modules[layer] for layer in layers}

    def thinned(table: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        return {module: tuple(names) for module, names in table.items() if module not in dense}

    if plan.schedule is None:
        ranges, chunks = [(first, steps, thinned(plan.assignments))], None
        refresh: tuple[int, ...] = ()
    else:
        kept = [(place, item) for place, item in enumerate(plan.schedule.ranges) if item.end > first]
        ranges = [(max(item.first, first), item.end, thinned(plan.schedule.assignments(place))) for place, item in kept]
        chunks = [item.chunks or (0, None) for _, item in kept] if plan.schedule.by_chunk else None
        refresh = plan.schedule.refresh
        if plan.assignments:
            raise SpecError(
                "a plan whose rules also hold outside its ranges cannot be made dense in its first steps; name all ranges."
            )
    schedule = StepSchedule.of(steps, ranges, refresh, chunks)
    return plan.model_copy(
        update={"assignments": {}, "schedule": schedule, "certificate": None, "quality": {}, "budgets": ()}
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
    base_model: BaseModelInfo, rules: Sequence[Rule], schedule: StepSchedule, layout: Layout, block_tokens: int
) -> Plan:
    """A plan that is dense wherever its schedule says nothing."""
    return Plan(
        base_model=base_model,
        block_tokens=block_tokens,
        unit="query_head",
        lengths_tokens=(layout.num_tokens,),
        rules={rule.label: rule for rule in rules},
        assignments={},
        schedule=schedule,
        layout=layout,
    )
