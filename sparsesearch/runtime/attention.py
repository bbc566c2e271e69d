"""The attention function registered with transformers: every rule kind, prefill, chunked prefill and decoding.

It keeps no state of its own (a counter here would recompile every compiled model at every call): rules live on the module, lengths come
with the call, and what must be remembered between calls lives in the cache.

Dynamic rules act on every call with more than one query, on that call's own queries: a later chunk of a prompt chooses for itself (its
estimate sees all keys but only its own queries), and so does a chunk of candidates in assisted decoding. A call of one query is dense for
them, except for rules that say they decode: these choose anew for every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsesearch.embedded_plan import CONFIG_KEY
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.rules.base import Rule
from sparsesearch.rules.zero import Zero
from sparsesearch.runtime.backends import masks_pay, serving_kernel
from sparsesearch.runtime.binding import LayerBinding, binding_of
from sparsesearch.runtime.mask_code import MaskCode, Span, element_mask, is_mask_code, spans_of
from sparsesearch.runtime.rule_attention import attend_rule, attend_static, pick_heads, take

NAME = CONFIG_KEY
LAW_KEYWORD = "sparsesearch_law_tokens"
PROBE_KEYWORD = "sparsesearch_probe"
_MOST_MASK_ELEMENTS = 1 << 30
"""Of a layer whose heads share one call: 1 GiB, and twice that as the bias that SDPA makes of it."""


@dataclass(frozen=True)
class AttentionCall:
    """One call as transformers made it.

    A forward pass may carry a callable under `PROBE_KEYWORD`: it is given every AttentionCall, and may return the output [B, S, H, D] in our
    stead (None: dense attention of the unpadded batch). So a model can be looked at without touching it.
    """

    module: nn.Module
    query: Float[Tensor, "B H S D"]
    key: Any
    value: Any
    mask: Tensor | None
    scaling: float | None
    is_causal: bool | None
    options: dict[str, Any]


def sparse_attention(
    module: nn.Module,
    query: Float[Tensor, "B H S D"],
    key: Any,
    value: Any,
    attention_mask: MaskCode | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B S H D"], None]:
    """Answer transformers' attention call; `attention_mask` is what `mask_code` returned, key and value may be a cache layer's handle.

    Raises:
        UnsupportedModelError: no plan is bound to the module, or the model asks for something no rule can express.
    """
    call = AttentionCall(module, query, key, value, attention_mask, scaling, is_causal, kwargs)
    probe = kwargs.get(PROBE_KEYWORD)
    if probe is not None:
        answer = probe(call)
        if answer is not None:
            return answer, None
        return sdpa_attention_forward(module, query, key, value, None, 0.0, scaling, is_causal)
    step = getattr(key, "step", None)
    if (
        step is not None
    ):  # one token for a static cache, whose prompt has passed the checks below; compiled and captured, so short
        return step(query, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    binding = binding_of(module)
    if binding is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} must have a plan bound to it when attn_implementation='sparsesearch', but has none. Load the "
            "checkpoint with from_pretrained after `import sparsesearch`, or call sparsesearch.apply(model, plan)."
        )
    refusal = unsupported_feature(call)
    if refusal:
        raise UnsupportedModelError(f"{binding.path}: {refusal}.")
    sliding_window = kwargs.get("sliding_window")
    attend = getattr(
        key, "attend", None
    )  # a cache layer of ours keeps the keys, and answers even where every head is dense
    if binding.all_dense and attend is None:
        mask = element_mask(attention_mask, query.shape[2], key.shape[2], sliding_window, query.device)
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal)
    if dropout:
        raise UnsupportedModelError(
            f"{binding.path}: attention dropout must be 0 under a sparse plan, but is {dropout}. Call model.eval() or set it to 0."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attend is not None:
        output: Tensor = attend(binding, query, attention_mask, scale, sliding_window)
    else:
        law_tokens = kwargs.get(LAW_KEYWORD)
        groups = binding.groups if query.shape[2] > 1 else binding.decode_groups
        output = attend_heads(groups, binding, query, key, value, attention_mask, law_tokens, scale, sliding_window)
    return output.transpose(1, 2).contiguous(), None


def unsupported_feature(call: AttentionCall) -> str | None:
    """What this attention call asks for that no rule can express, or None."""
    for name, meaning in (("softcap", "soft-capped scores"), ("s_aux", "attention sinks in the softmax")):
        if call.options.get(name) is not None:
            return f"{meaning} ({name}) are not supported"
    if call.options.get("position_bias") is not None:
        return "additive position biases (position_bias) are not supported"
    if call.options.get("output_attentions"):
        return "output_attentions=True is not supported: skipped tiles have no weights. Use attn_implementation='eager'"
    if call.mask is not None and not is_mask_code(call.mask):
        return f"a ready-made attention mask {tuple(call.mask.shape)} is not supported; pass a 2-D padding mask"
    causal = call.is_causal if call.is_causal is not None else getattr(call.module, "is_causal", True)
    if not causal and call.query.shape[2] > 1:
        return "bidirectional and cross attention are not supported"
    if isinstance(call.value, Tensor) and call.value.shape[-1] != call.query.shape[-1]:
        sizes = f"{call.value.shape[-1]} and {call.query.shape[-1]}"
        return f"values of another size than queries ({sizes}) are not supported"
    return None


def attend_heads(
    groups: Sequence[tuple[Rule, tuple[int, ...]]],
    binding: LayerBinding,
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B G T D"],
    value: Float[Tensor, "B G T D"],
    code: MaskCode | None,
    law_tokens: Int[Tensor, " B"] | None,
    scale: float,
    sliding_window: int | None,
    layer_heads: Sequence[int] | None = None,
) -> Float[Tensor, "B h S D"]:
    """Attention of all query heads, each in one of `groups`; padding changes nothing, and queries that are padding give 0.

    Kernels take the call whole; elsewhere, and where an element mask is needed, it goes one sequence and one rule at a time.
    `layer_heads` says which heads of the layer the given ones are; None: all of them.
    """
    batch_size, q_len, kv_slots = query.shape[0], query.shape[2], key.shape[2]
    found = spans_of(code, law_tokens, batch_size, q_len, kv_slots, binding.block_tokens)
    if sliding_window is None or kv_slots <= sliding_window:
        answer = _attend_on_device(groups, binding, query, key, value, found, scale, layer_heads)
        if answer is not None:
            return answer
    per_kv_head = query.shape[1] // key.shape[1]
    output: Tensor | None = None
    for sequence, span in enumerate(found):
        q = take(query, span.rows, span.q_slots)
        k, v = (take(x, span.rows, span.k_slots) for x in (key, value))
        parts = []
        together = _under_one_mask(groups, query, span, sliding_window)
        apart = [group for group in groups if group not in together]
        heads = [head for _, members in (*together, *apart) for head in members]
        order = sorted(range(len(heads)), key=heads.__getitem__)
        if together:
            rules, masked = zip(*((rule, head) for rule, members in together for head in members), strict=True)
            kv_heads = [head // per_kv_head for head in masked]
            parts.append(attend_static(rules, pick_heads(q, masked), k, v, kv_heads, span.grid, scale))
        for rule, members in apart:
            kv_heads = [head // per_kv_head for head in members]
            own = pick_heads(q, members)
            place = sequence, members if layer_heads is None else tuple(layer_heads[head] for head in members)
            parts.append(attend_rule(rule, own, k, v, kv_heads, span, binding, scale, sliding_window, place))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        joined = joined if order == list(range(len(heads))) else joined[:, order]
        if span.rows == slice(None) and isinstance(span.q_slots, slice) and span.q_slots == slice(None):
            return joined
        if output is None:
            output = query.new_zeros(batch_size, len(heads), q_len, value.shape[-1])
        _put(output, span, joined)
    return query.new_zeros(batch_size, len(heads), q_len, value.shape[-1]) if output is None else output


def _under_one_mask(
    groups: Sequence[tuple[Rule, tuple[int, ...]]], query: Tensor, span: Span, sliding_window: int | None
) -> list[tuple[Rule, tuple[int, ...]]]:
    """Groups that go through one masked call: where gradients flow on a GPU, to which a few heads at a time are too little work."""
    whole = span.grid.q_len == span.grid.kv_len and (sliding_window is None or span.grid.kv_len <= sliding_window)
    elements = query.shape[1] * span.grid.q_len * span.grid.kv_len
    if not masks_pay(query) or not whole or elements > _MOST_MASK_ELEMENTS:
        return []
    return [(rule, members) for rule, members in groups if rule.rest == "drop" and not rule.dynamic]


def _attend_on_device(
    groups: Sequence[tuple[Rule, tuple[int, ...]]],
    binding: LayerBinding,
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B G T D"],
    value: Float[Tensor, "B G T D"],
    found: Sequence[Span],
    scale: float,
    layer_heads: Sequence[int] | None,
) -> Float[Tensor, "B H S D"] | None:
    """The whole call through a kernel, or None where the backend is not a kernel or a sequence is not in one piece."""
    kernel = serving_kernel(binding.backend, query, key, value, binding.block_tokens)
    if kernel is None:
        return None
    from sparsesearch.runtime.device_attention import layer_call, places_of
    from sparsesearch.runtime.device_decode import decode_choosing, decode_heads

    places = places_of(found, query.shape[0])
    if places is None:
        return None
    if not places:
        return torch.zeros_like(query)
    of_head = {head: rule for rule, members in groups for head in members}
    rules = tuple(of_head[head] for head in range(query.shape[1]))
    if query.shape[2] == 1:
        if not any(rule.decodes for rule in rules):
            return decode_heads(rules, query, key, value, places, scale)
        chosen = decode_choosing(binding, rules, layer_heads, found, query, key, value, scale)
        rest = tuple(Zero() if rule.decodes else rule for rule in rules)
        return chosen + decode_heads(rest, query, key, value, places, scale)
    return layer_call(binding, rules, layer_heads, found, places, query, key, kernel)(query, key, value, scale)


def _put(output: Float[Tensor, "B h S D"], span: Span, part: Float[Tensor, "b h s D"]) -> None:
    rows = torch.arange(output.shape[0], device=output.device)[span.rows]
    slots = torch.arange(output.shape[2], device=output.device)
    slots = slots[span.q_slots.to(output.device) if isinstance(span.q_slots, Tensor) else span.q_slots]
    output[rows[:, None], :, slots] = part.transpose(1, 2)
