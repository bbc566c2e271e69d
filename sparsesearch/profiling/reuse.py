"""What layers lose when they run the selection of an earlier layer, and what they lose otherwise, measured on the same passes.

For every layer j and every source (layer i within `span` before it, emitter e) the tiles that e leaves in layer i are scored in layer j exactly
as a candidate of j's own is (`tile_scores`). Heads of different layers do not correspond, so a map says which source head each head reads:

    layer     every KV group reads the source group whose tiles hold most of its attention mass
    kv_group  the same, but as a permutation per layer, so that chains of KV groups (lanes) decide for themselves

Given a plan, the model runs under it, so that what is measured is what a chain of reuses really sees.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import PreTrainedModel

from sparsesearch.block_mask import BlockGrid
from sparsesearch.calibration import Sample
from sparsesearch.plan import Plan
from sparsesearch.profiling.capture import AttentionCall, forward_calls
from sparsesearch.profiling.layer_inputs import calls_and_gradients, head_tiles, layer_input, repeated
from sparsesearch.profiling.layer_scores import LayerScores
from sparsesearch.profiling.reuse_menu import ReuseMenu
from sparsesearch.profiling.run import frozen, silent
from sparsesearch.profiling.tile_scores import score_layer, tile_mass
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.live import apply

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class HeadMap:
    """Whose selection each head reads.

    Attributes:
        source_group: [source layer, target layer, KV group of the target] -> KV group of the source.
        lanes: [layer, lane] -> KV group; for the unit `layer` the identity.
    """

    source_group: Int[ndarray, "L L G"]
    lanes: Int[ndarray, "L G"]

    def heads(self, source: int, target: int, group_size: int) -> tuple[int, ...]:
        """Source head of every head of a layer; members of a group keep their places."""
        groups = self.source_group[source, target]
        return tuple(int(group) * group_size + member for group in groups for member in range(group_size))


@dataclass(frozen=True, eq=False)
class ReuseScores:
    """Sums over the samples of one length, per KV group; arrays of the reuse are 0 where a pair was not measured.

    Attributes:
        text: predicted KL, nats per token: of candidate o in layer l, group g.
        answer: squared log-odds per answer token, likewise.
        tiles: computed tiles of the group, likewise.
        reuse_text: of layer j running what emitter e left in layer i.
        reuse_answer: likewise.
        reuse_tiles: likewise.
        overlap: share of what e would leave in layer j that layer i's selection holds, averaged over the group's heads.
        free_overlap: the same without what every layer selects (diagonal, first block, rows that keep everything).
    """

    text: Float[ndarray, "L G O"]
    answer: Float[ndarray, "L G O"]
    tiles: Float[ndarray, "L G O"]
    reuse_text: Float[ndarray, "L E L G"]
    reuse_answer: Float[ndarray, "L E L G"]
    reuse_tiles: Float[ndarray, "L E L G"]
    overlap: Float[ndarray, "L E L G"]
    free_overlap: Float[ndarray, "L E L G"]


def map_heads(
    model: PreTrainedModel, menu: ReuseMenu, samples: Sequence[Sample], *, progress: Progress = silent
) -> HeadMap:
    """Find whose selection each head should read, from how much of its attention mass the others' tiles hold."""
    layers, groups = menu.num_layers, menu.num_groups
    recall = np.zeros((layers, layers, groups, groups))  # source layer, target layer, target group, source group
    for index, sample in enumerate(samples):
        progress("match heads", index, len(samples))
        grid = _grid(menu, sample)
        calls = forward_calls(model, sample.input_ids)
        left = [_left(menu, layer, call, grid).float().mean(1) for layer, call in enumerate(calls)]
        for target, call in enumerate(calls):
            mass = tile_mass(repeated(call), grid, call.sliding_window)
            for source in menu.pairs(target):
                by_group = (x.unflatten(0, (groups, -1)).float() for x in (mass, left[source]))
                recall[source, target] += torch.einsum("gmpj,hmpj->gh", *by_group).cpu().numpy()
    if menu.unit == "layer":
        return HeadMap(recall.argmax(-1), np.tile(np.arange(groups), (layers, 1)))
    lanes = np.zeros((layers, groups), dtype=np.int64)
    lanes[0] = np.arange(groups)
    source_group = np.zeros((layers, layers, groups), dtype=np.int64)
    for target in range(1, layers):
        weight = sum(recall[source, target][:, lanes[source]] for source in menu.pairs(target))  # [group, lane]
        group, lane = linear_sum_assignment(-np.asarray(weight))
        lanes[target, lane] = group
        for source in range(target):
            source_group[source, target, lanes[target]] = lanes[source]
    return HeadMap(source_group, lanes)


def score_reuse(
    model: PreTrainedModel,
    menu: ReuseMenu,
    heads: HeadMap,
    samples: Sequence[Sample],
    *,
    plan: Plan | None = None,
    num_probes: int = 4,
    seed: int = 0,
    progress: Progress = silent,
) -> ReuseScores:
    """Score every candidate and every reuse of every layer on sequences of one length.

    Args:
        model: dense outside; in evaluation mode.
        menu: what may be run and reused.
        heads: from `map_heads`.
        samples: of one length.
        plan: what runs while it is measured; None: dense.
        num_probes: Fisher probes per sequence.
        seed: of the probes.
        progress: called with ("score reuse", done, total).
    """
    found = _empty(menu)
    answers = np.array([int(sample.answer_mask.sum()) for sample in samples])
    length = len(samples[0].input_ids)
    weights = (answers > 0) / answers.sum() if answers.any() else np.full(len(answers), 1 / (length * len(answers)))
    for index, sample in enumerate(samples):
        progress("score reuse", index, len(samples))
        with frozen(model), nullcontext() if plan is None else apply(model, plan, allow_other_weights=True):
            calls, gradients = calls_and_gradients(
                model, sample, num_probes=num_probes, seed=seed + 1000 * length + index
            )
        grid = _grid(menu, sample)
        left = [_left(menu, layer, call, grid) for layer, call in enumerate(calls)]
        for layer, call in enumerate(calls):
            probes = [probe[layer] for probe in gradients.fisher]
            inputs = layer_input(call, probes, gradients.answer[layer], gradients.answer_ce[layer])
            own = head_tiles(menu.rules, menu.profile.manifest.calibrated, _module(menu, layer), inputs, grid)
            reused = [_carried(menu, heads, left, source, layer, grid) for source in menu.pairs(layer)]
            tiles = torch.cat([own, *reused], 1)
            stand_ins = [Dense()] * (tiles.shape[1] - own.shape[1])
            scores = score_layer([*menu.rules, *stand_ins], tiles, inputs, grid)
            _add(found, menu, layer, scores, length, len(samples), float(weights[index]))
            for source, carried in zip(menu.pairs(layer), reused, strict=True):
                _add_overlap(found, menu, source, layer, carried, left[layer], grid, len(samples))
    return found


def _empty(menu: ReuseMenu) -> ReuseScores:
    layers, groups = menu.num_layers, menu.num_groups
    own, reuse = (layers, groups, len(menu.rules)), (layers, len(menu.emitters), layers, groups)
    return ReuseScores(*(np.zeros(own) for _ in range(3)), *(np.zeros(reuse) for _ in range(5)))


def _grid(menu: ReuseMenu, sample: Sample) -> BlockGrid:
    length = len(sample.input_ids)
    return BlockGrid(length, length, menu.profile.manifest.block_tokens)


def _module(menu: ReuseMenu, layer: int) -> str:
    return menu.profile.manifest.base_model.modules[layer]


def _left(menu: ReuseMenu, layer: int, call: AttentionCall, grid: BlockGrid) -> Bool[Tensor, "H E N N"]:
    """What every emitter would leave in a layer."""
    q, k = repeated(call)
    rules = [menu.rules[place] for place in menu.emitters]
    shape = (
        *q.shape[:-2],
        grid.num_q_blocks,
        grid.num_k_blocks,
    )  # a rule that leaves prompts dense chooses once for all heads
    return torch.stack([rule.left_behind(rule.select(grid, q, k).expand(shape), grid, q, k) for rule in rules], 1)


def _carried(
    menu: ReuseMenu, heads: HeadMap, left: list[Tensor], source: int, target: int, grid: BlockGrid
) -> Bool[Tensor, "H E N N"]:
    """What a layer runs when it reuses: the mapped heads' tiles and its own diagonal."""
    places = list(heads.heads(source, target, menu.group_size))
    return left[source][places] | grid.diagonal(left[source].device)


def _add(
    found: ReuseScores, menu: ReuseMenu, layer: int, scores: LayerScores, length: int, count: int, answer_weight: float
) -> None:
    """Add one sample's scores of a layer."""

    def per_group(x: Tensor) -> Tensor:
        summed: Tensor = x.unflatten(-2, (menu.num_groups, menu.group_size)).sum(-2)
        return summed

    columns: Mapping[str, Tensor] = {
        "text": per_group(scores.fisher).square().mean(0) / (2 * length * count),
        "answer": scores.answer_group * answer_weight,
        "tiles": per_group(scores.tiles) / count,
    }
    size, emitting = len(menu.rules), len(menu.emitters)
    for name, tensor in columns.items():
        values = tensor.double().cpu().numpy()
        getattr(found, name)[layer] += values[:, :size]
        for place, source in enumerate(menu.pairs(layer)):
            part = values[:, size + place * emitting : size + (place + 1) * emitting]
            getattr(found, f"reuse_{name}")[source, :, layer] += part.T


def _add_overlap(
    found: ReuseScores,
    menu: ReuseMenu,
    source: int,
    target: int,
    carried: Bool[Tensor, "H E N N"],
    own: Bool[Tensor, "H E N N"],
    grid: BlockGrid,
    count: int,
) -> None:
    """Add how much of its own selection a layer finds in the one it reuses."""
    device = own.device
    everything = (own | ~grid.reachable(device)).all(-1, keepdim=True)
    free = own & ~grid.diagonal(device) & (grid.k_blocks(device) > 0) & ~everything
    for name, wanted in (("overlap", own), ("free_overlap", free)):
        chosen = wanted.sum((-1, -2))
        share = torch.where(chosen > 0, (wanted & carried).sum((-1, -2)) / chosen.clamp(min=1), 1.0)
        per_group = share.unflatten(0, (menu.num_groups, menu.group_size)).mean(1)
        getattr(found, name)[source, :, target] += per_group.T.double().cpu().numpy() / count
