"""What a model under a plan must compute: every token recomputed, each head through the reference kernel under its expanded mask.

It shares nothing with the runtime's attention, caches or kernels, and costs S x S per head.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.errors import SpecError
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.rules.base import Rule
from sparsesearch.rules.reuse import Reuse
from sparsesearch.runtime.attention import PROBE_KEYWORD, AttentionCall
from sparsesearch.runtime.binding import LayerBinding, binding_of

_Left = dict[BlockGrid, Tensor]
"""What a head chose in each call, for heads that reuse it."""


def oracle_logits(model: PreTrainedModel, ids: Int[Tensor, " S"], prompt_tokens: int) -> Float[Tensor, "S V"]:
    """Logits of one unpadded sequence whose first `prompt_tokens` were prefilled and whose others were decoded one by one.

    Args:
        model: a model that runs a plan.
        ids: the sequence.
        prompt_tokens: where laws are evaluated and where dynamic rules end, except those that decode.

    Raises:
        SpecError: no plan is bound to the model.
    """
    paths = [binding.path for module in model.modules() if (binding := binding_of(module)) is not None]
    left: dict[tuple[int, int], _Left] = {}

    def answer(call: AttentionCall) -> Tensor:
        binding = binding_of(call.module)
        if binding is None:
            raise SpecError("the model must run a plan, but none is bound. Call sparsesearch.apply first.")
        size = call.query.shape[1] // call.key.shape[1]
        scale = call.query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        window = call.options.get("sliding_window")
        heads = []
        for head, rule in enumerate(binding.rules):
            q, k, v = call.query[0, head], call.key[0, head // size], call.value[0, head // size]
            source = rule.source_head(head)
            mask, chosen = _mask(rule, binding, q * scale, k, prompt_tokens, None if source is None else left[source])
            left[paths.index(binding.path), head] = chosen
            later = binding.kept_by[head]
            if later != rule:  # of the tokens that are generated; dynamic rules are dense there unless they decode
                own, _ = _mask(later, binding, q * scale, k, prompt_tokens, None, only_decodes=True)
                mask = torch.cat([mask[:prompt_tokens], own[prompt_tokens:]])
            if window is not None:
                positions = torch.arange(len(k), device=k.device)
                mask = mask & (positions[:, None] - positions < window)
            # a mean is attention whose scores are all equal: the mean of what the mask leaves
            parts = q[:prompt_tokens] * (rule.rest != "mean_value"), q[prompt_tokens:] * (later.rest != "mean_value")
            q = torch.cat(parts)
            heads.append(masked_attention(q, k, v, mask, scale=scale)[0])
        return torch.stack(heads, 1)[None]

    with torch.no_grad():
        logits: Tensor = model(ids[None], use_cache=False, **{PROBE_KEYWORD: answer}).logits
    return logits[0]


def _mask(
    rule: Rule,
    binding: LayerBinding,
    q: Tensor,
    k: Tensor,
    prompt_tokens: int,
    left: _Left | None,
    *,
    only_decodes: bool = False,
) -> tuple[Tensor, _Left]:
    """Element mask [S, S] of one head, and what it leaves for later layers; `left` is what its source left."""
    length, device = len(k), k.device
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    grid = BlockGrid(length, length, binding.block_tokens, prompt_tokens)
    if rule.rest == "zero":
        return torch.zeros_like(causal), {}
    if rule.rest == "mean_value":
        return causal, {}
    if not rule.dynamic:
        return expand(rule.select(grid).to(device), grid), {}
    first = prompt_tokens if prompt_tokens > 1 else 0  # a single query is decoding
    calls = [BlockGrid(first, first, binding.block_tokens)] if first and not only_decodes else []
    for row in range(first, length if rule.decodes else 0):
        calls.append(BlockGrid(1, row + 1, binding.block_tokens, prompt_tokens))
    leaves: _Left = {}
    for call in calls:
        own_q, own_k = q[call.q_start : call.kv_len], k[: call.kv_len]
        if isinstance(rule, Reuse):
            tiles = rule.select(call, own_q, own_k, left=(left or {})[call])
        else:
            tiles = rule.select(call, own_q, own_k)
        leaves[call] = rule.left_behind(tiles, call, own_q, own_k)
        causal[call.q_start : call.kv_len, : call.kv_len] = expand(tiles.to(device), call)
    return causal, leaves
