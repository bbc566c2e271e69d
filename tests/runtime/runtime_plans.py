"""Plans and the independent reference that the runtime tests share."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.rules import Rule, parse_rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.dense_source import DenseSource
from sparsesearch.rules.reuse import Reuse
from sparsesearch.runtime.fingerprint import describe

BLOCK_TOKENS = 16

RULES = {
    "dense": {"kind": "dense"},
    "stream": {"kind": "sink_window", "sink": 16, "window": 32},
    "elastic": {"kind": "sink_window", "sink": 0, "window": {"a": 16, "b": 0.25}},
    "zero": {"kind": "zero"},
    "mean": {"kind": "mean_value"},
    "slash": {"kind": "vertical_slash", "vertical": 32, "slash": 32, "probe": 16},
    "pooled": {"kind": "pooled_topk", "keep": {"b": 0.3}, "sink": 16},
    "bounds": {"kind": "bounds_topk", "keep": 48, "sink": 16},
    "bounds everywhere": {"kind": "bounds_topk", "keep": 48, "sink": 16, "prefill": True},
    "asks": {"kind": "tri_shape", "sink": 16, "window": 16, "last": 20},
    "rows": {"kind": "token_rows", "tail": 0.4, "min_tokens": 16, "window": 16, "probe": 16},
}
SOURCES = {"dense_source": {"kind": "dense_source", "keep": {"b": 0.3}, "sink": 16}}


def rule(name: str) -> Rule:
    if name == "bitmap":
        mass = torch.rand(7, 7, generator=torch.Generator().manual_seed(3))
        return parse_rule({"kind": "fixed_blocks", "keep": 0.4}, where="tests").calibrated(mass)
    return parse_rule({**RULES, **SOURCES}[name], where="tests")


def cycled_plan(model: PreTrainedModel, names: Sequence[str]) -> Plan:
    """The named rules, dealt to the query heads of all layers in turn."""
    info = describe(model, "tests")
    rules = [rule(name) for name in names]
    return Plan(
        base_model=info,
        block_tokens=BLOCK_TOKENS,
        unit="query_head",
        lengths_tokens=(256,),
        rules={one.label: one for one in rules},
        assignments={
            path: tuple(rules[(layer * count + head) % len(rules)].label for head in range(count))
            for layer, (path, count) in enumerate(zip(info.modules, info.num_heads, strict=True))
        },
    )


def group_plan(model: PreTrainedModel, names: Sequence[str]) -> Plan:
    """Like `cycled_plan`, but all query heads of a KV head share a rule, so that evicting rules drop keys."""
    plan = cycled_plan(model, names)
    labels = [rule(name).label for name in names]
    assignments = {}
    info = plan.base_model
    for layer, (path, heads, kv_heads) in enumerate(zip(info.modules, info.num_heads, info.num_kv_heads, strict=True)):
        assignments[path] = tuple(labels[(layer + head // (heads // kv_heads)) % len(labels)] for head in range(heads))
    return plan.model_copy(update={"assignments": assignments, "unit": "kv_group"})


def dense_plan(model: PreTrainedModel) -> Plan:
    return uniform_plan(describe(model, "tests"), Dense(), block_tokens=BLOCK_TOKENS, lengths_tokens=(256,))


def oracle_logits(
    model: PreTrainedModel,
    plan: Plan,
    ids: Tensor,
    prompt_tokens: int | None = None,
    calls: Sequence[int] | None = None,
) -> Tensor:
    """Logits of one unpadded row, recomputed from scratch: per head, the oracle under the expanded mask. Shares nothing with the runtime.

    `calls` are the tokens of each call, by default the prompt at once and then one by one. Laws stay at the prompt's length; a dynamic rule chooses
    for every call of several tokens, and for single ones only if it decodes.
    """
    prompt = prompt_tokens or len(ids)
    sizes = calls or [prompt] + [1] * (len(ids) - prompt)
    ends = list(itertools.accumulate(sizes))
    assert ends[-1] == len(ids)
    paths = {id(module): path for path, module in model.named_modules()}
    left: dict[
        tuple[int, int], list[Tensor]
    ] = {}  # (layer, head) -> tiles that a dynamic rule left, per call of several tokens

    def attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        scale = scaling or query.shape[-1] ** -0.5
        heads = []
        path = paths[id(module)]
        layer = plan.base_model.modules.index(path)
        grids = [BlockGrid(size, end, plan.block_tokens, prompt) for size, end in zip(sizes, ends, strict=True)]
        for head, one in enumerate(plan.module_rules(path)):
            kv_head = head * key.shape[1] // query.shape[1]
            q, k, v = query[0, head], key[0, kv_head], value[0, kv_head]
            sources = left[one.source_head(head)] if one.reuses else None
            tiles = _choices(one, q * scale, k, grids, sources) if one.dynamic else []
            mask = _visible(one, k, grids, tiles, sliding_window)
            scored = q * (one.rest != "mean_value")  # a mean is attention whose scores are all equal
            heads.append(masked_attention(scored, k, v, mask, scale=scale)[0])
            left[layer, head] = [
                one.left_behind(own, grid, *_part(q * scale, k, grid))
                for own, grid in zip(tiles, grids, strict=one.dynamic)
            ]
        return torch.stack(heads, 1)[None], None

    AttentionInterface.register("test_oracle", attention)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("test_oracle")
        with torch.no_grad():
            return model(ids[None], use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(before)


def _part(q: Tensor, k: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """Queries and keys of one call."""
    return q[grid.q_start : grid.kv_len], k[: grid.kv_len]


def _choices(
    one: Rule, q: Tensor, k: Tensor, grids: Sequence[BlockGrid], sources: Sequence[Tensor] | None
) -> list[Tensor]:
    """A dynamic rule's tiles in each call."""
    tiles = []
    for call, grid in enumerate(grids):
        if grid.q_len == 1 and not one.decodes:
            tiles.append(grid.reachable(q.device))
        elif isinstance(one, Reuse):
            tiles.append(sources[call] | grid.diagonal(q.device))
        else:
            tiles.append(one.select(grid, *_part(q, k, grid)))
    return tiles


def _visible(
    one: Rule, k: Tensor, grids: Sequence[BlockGrid], tiles: Sequence[Tensor], sliding_window: int | None
) -> Tensor:
    """Element mask [T, T] of one head."""
    distance = torch.arange(len(k), device=k.device)[:, None] - torch.arange(len(k), device=k.device)
    mask = (distance >= 0) & (distance < sliding_window if sliding_window else True)
    if one.rest == "mean_value":
        return mask
    if not one.dynamic:
        full = BlockGrid(len(k), len(k), grids[0].block_tokens, grids[0].law_len)
        return mask & expand(one.select(full), full).to(k.device)
    if isinstance(one, DenseSource):
        return mask
    for grid, own in zip(grids, tiles, strict=True):
        mask[grid.q_start : grid.kv_len, : grid.kv_len] &= expand(own, grid)
    return mask


def left_padded(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random rows of the given lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def greedy_oracle(model: PreTrainedModel, plan: Plan, prompt: Tensor, new_tokens: int) -> Tensor:
    """Greedy decoding by recomputing everything at every token."""
    ids = prompt
    for _ in range(new_tokens):
        ids = torch.cat([ids, oracle_logits(model, plan, ids, len(prompt))[-1:].argmax(-1)])
    return ids[len(prompt) :]


def reuse_plan(
    model: PreTrainedModel, sources: Sequence[str], reuses: Sequence[Rule | str], *, period: int = 0
) -> Plan:
    """Layers 0, period, 2·period … (0 alone without a period) run `sources`, dealt to their heads; the others run `reuses`.

    A reuse's layer index is replaced by that of the last source layer.
    """
    info = describe(model, "tests")
    assignments, rules, last = {}, {}, 0
    for layer, (path, count) in enumerate(zip(info.modules, info.num_heads, strict=True)):
        if layer == 0 or (period and layer % period == 0):
            last, own = layer, [rule(name) for name in sources]
        else:
            named = [rule(one) if isinstance(one, str) else one for one in reuses]
            own = [one.model_copy(update={"layer": last}) if isinstance(one, Reuse) else one for one in named]
        rules |= {one.label: one for one in own}
        assignments[path] = tuple(own[head % len(own)].label for head in range(count))
    return Plan(
        base_model=info,
        block_tokens=BLOCK_TOKENS,
        unit="query_head",
        lengths_tokens=(256,),
        rules=rules,
        assignments=assignments,
    )
