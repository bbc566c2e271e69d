"""What happens just before a decoder's forward: the cache gets our layers, and the prompt's length is made known to every layer.

A stateless forward-pre-hook; it may be copied with the model. What must be remembered between calls is kept on the cache.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from sparsesearch.errors import SpecError, UnsupportedModelError
from sparsesearch.runtime.attention import LAW_KEYWORD, NAME
from sparsesearch.runtime.binding import binding_of

_LAW = "sparsesearch_law_tokens"
_PROMPT = "sparsesearch_prompt_tokens"
_ONLY_PREFILLED = "sparsesearch_only_prefilled"


def prepare_call(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, ragged: bool
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The hook, for `register_forward_pre_hook(..., with_kwargs=True)` on the decoder (the model without its head).

    Args:
        decoder: the innermost model that holds all attention modules; heads and outer models go through it.
        args: positional arguments of its forward.
        kwargs: keyword arguments of its forward.
        ragged: whether evicting rules may drop keys (else they are only masked).
    """
    config: Any = decoder.config
    if config._attn_implementation != NAME:
        return None
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "output_attentions=True is not supported under a sparse plan: skipped tiles have no weights. "
            "Run the model dense with attn_implementation='eager'."
        )
    if args:
        kwargs = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
    cache = kwargs.get("past_key_values")
    if cache is None:
        use_cache = kwargs.get("use_cache")
        wanted = getattr(config, "use_cache", False) if use_cache is None else use_cache
        if not wanted or (decoder.training and getattr(decoder, "gradient_checkpointing", False)):
            return (), kwargs
        cache = kwargs["past_key_values"] = DynamicCache(config=config)
    if isinstance(cache, Cache):
        kwargs = {**kwargs, LAW_KEYWORD: _law_tokens(decoder, cache, kwargs)}
    return (), kwargs


def _law_tokens(decoder: nn.Module, cache: Any, kwargs: dict[str, Any]) -> Int[Tensor, " B"]:
    """Length of each row's prompt, fixed at the first prefill and kept with the cache."""
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    batch_size, q_len = inputs.shape[:2]
    law = getattr(cache, _LAW, None)
    if law is not None and torch.compiler.is_compiling():
        return law  # type: ignore[no-any-return]
    past = int(cache.get_seq_length())
    prompt = getattr(cache, _PROMPT, None)
    if law is None or past == 0 or (prompt is not None and past < prompt):
        law = _real_tokens(kwargs.get("attention_mask"), batch_size, past + q_len)
        if prompt is not None:
            law = law + max(0, prompt - past - q_len)
        setattr(cache, _LAW, law)
    elif q_len > 1 and prompt is None and getattr(cache, _ONLY_PREFILLED, False) and _length_dependent(decoder):
        raise SpecError(
            "the prompt's length must be known before its first chunk, because this plan has rules that grow with it, but a second "
            "chunk of a prompt came. Pass past_key_values=sparsesearch.sparse_cache(model, prompt_tokens=...)."
        )
    setattr(cache, _ONLY_PREFILLED, q_len > 1)
    if len(law) != batch_size:
        raise SpecError(f"the cache was made for a batch of {len(law)}, but {batch_size} rows came. Use a new cache.")
    return law


def _real_tokens(mask: Any, batch_size: int, seen: int) -> Int[Tensor, " B"]:
    """Tokens of each row that are not padding, on the CPU: they decide shapes."""
    if isinstance(mask, dict):  # codes per layer type, made by `generate`: a code's largest entry is the row's length
        codes = [code for code in mask.values() if isinstance(code, Tensor) and code.dim() == 2]
        if codes:
            return codes[0].amax(1).long().cpu()
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask[:, :seen] != 0).sum(1).cpu()
    return torch.full((batch_size,), seen)


def _length_dependent(decoder: nn.Module) -> bool:
    bindings = (binding_of(module) for module in decoder.modules())
    return any(binding.length_dependent for binding in bindings if binding is not None)
