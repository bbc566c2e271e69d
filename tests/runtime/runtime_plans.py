"""Plans and the independent reference that the runtime tests share."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.kernels.reference import masked_attention, tile_attention
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.rules import Rule, parse_rule
from sparsesearch.rules.dense import Dense
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
    "bounds": {"kind": "bounds_topk", "keep": 32, "sink": 16},
    "bounds everywhere": {"kind": "bounds_topk", "keep": 32, "sink": 16, "prefill": True},
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
    """The named rules, dealt to the query heads in turn, every layer beginning one further."""
    info = describe(model, "tests")
    rules = [rule(name) for name in names]
    return Plan(
        base_model=info,
        block_tokens=BLOCK_TOKENS,
        unit="query_head",
        lengths_tokens=(256,),
        rules={one.label: one for one in rules},
        assignments={
            path: tuple(rules[(layer + head) % len(rules)].label for head in range(count))
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


def oracle_logits(model: PreTrainedModel, plan: Plan, ids: Tensor, prompt_tokens: int | None = None) -> Tensor:
    """Logits of one unpadded row, recomputed from scratch: per head, the oracle under the expanded mask. Shares nothing with the runtime.

    Queries of the prompt attend as its prefill did, later ones as decoding does: dynamic rules are dense there unless they decode, laws stay at
    the prompt's length.
    """
    prompt = prompt_tokens or len(ids)
    paths = {id(module): path for path, module in model.named_modules()}
    left: dict[tuple[int, int], Tensor] = {}  # (layer, head) -> tiles that a dynamic rule left

    def attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        scale = scaling or query.shape[-1] ** -0.5
        heads = []
        path = paths[id(module)]
        layer = plan.base_model.modules.index(path)
        for head, one in enumerate(plan.module_rules(path)):
            kv_head = head * key.shape[1] // query.shape[1]
            q, k, v = query[0, head], key[0, kv_head], value[0, kv_head]
            source = left[one.source_head(head)] if one.reuses else None
            heads.append(_oracle_head(one, q, k, v, scale, prompt, sliding_window, plan.block_tokens, source))
            if one.dynamic and prompt > 1:
                first = BlockGrid(prompt, prompt, plan.block_tokens)
                tiles = _chosen(one, q[:prompt] * scale, k[:prompt], first, source)
                left[layer, head] = one.left_behind(tiles, first, q[:prompt] * scale, k[:prompt])
        return torch.stack(heads, 1)[None], None

    AttentionInterface.register("test_oracle", attention)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("test_oracle")
        with torch.no_grad():
            return model(ids[None], use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(before)


def _chosen(one: Rule, q: Tensor, k: Tensor, grid: BlockGrid, source: Tensor | None) -> Tensor:
    if isinstance(one, Reuse):
        diagonal = torch.eye(grid.num_k_blocks, dtype=torch.bool, device=source.device)
        return source | diagonal
    return one.select(grid, q, k)


def _oracle_head(
    one: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    prompt: int,
    sliding_window: int | None,
    block: int,
    source: Tensor | None = None,
):
    length = len(k)
    distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
    near = (distance < sliding_window) if sliding_window else torch.ones_like(distance, dtype=torch.bool)
    full = BlockGrid(length, length, block, prompt)
    if one.rest == "zero":
        return tile_attention(q, k, v, one.select(full).to(q.device), full, scale=scale, rest="zero")
    if one.rest == "mean_value":
        return masked_attention(q * 0, k, v, near & (distance >= 0), scale=scale)[0]
    if one.dynamic:
        first = BlockGrid(prompt, prompt, block)
        mask = distance >= 0
        if prompt > 1:
            mask[:prompt, :prompt] = expand(_chosen(one, q[:prompt] * scale, k[:prompt], first, source), first)
        for row in range(prompt if prompt > 1 else 0, length if one.decodes else 0):
            step = BlockGrid(1, row + 1, block, prompt)
            choice = one.select(step, q[row : row + 1] * scale, k[: row + 1])
            mask[row, : row + 1] = expand(choice, step)[0]
    else:
        mask = expand(one.select(full), full).to(q.device)
    return masked_attention(q, k, v, mask & near, scale=scale)[0]


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
