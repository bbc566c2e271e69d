"""What happens just before a decoder's forward: the cache gets our layers, and the prompt's length is made known to every layer.

A stateless forward-pre-hook; it may be copied with the model. What must be remembered between calls is kept on the cache.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from sparsesearch.errors import SpecError, UnsupportedModelError
from sparsesearch.rules.mean_value import MeanValue
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.runtime.attention import LAW_KEYWORD, NAME
from sparsesearch.runtime.binding import binding_of
from sparsesearch.runtime.cache import PlanCacheLayer, install_layers
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.mask_code import is_mask_code
from sparsesearch.runtime.static_layer import StaticPlanLayer

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
    name = _cache_name(decoder, kwargs)
    cache = kwargs.get(name)
    if cache is None:
        use_cache = kwargs.get("use_cache")
        wanted = getattr(config, "use_cache", False) if use_cache is None else use_cache
        if not wanted or (decoder.training and getattr(decoder, "gradient_checkpointing", False)):
            return (), kwargs
        cache = kwargs[name] = DynamicCache(config=config)
    if _is_step(cache, kwargs):
        return (), kwargs
    if isinstance(cache, Cache):
        kwargs = {**kwargs, LAW_KEYWORD: _law_tokens(decoder, cache, kwargs, ragged)}
    return (), kwargs


def _cache_name(decoder: nn.Module, kwargs: dict[str, Any]) -> str:
    """The keyword of the cache in this call: the one that was given, else the one that the forward takes."""
    names = ("cache", "past_key_values")
    given = [name for name in names if kwargs.get(name) is not None] or [name for name in names if name in kwargs]
    if given:
        return given[0]
    taken = inspect.signature(decoder.forward).parameters
    return next((name for name in names if name in taken), CACHE_KEYWORD)


def _may_be_ours(cache: Any) -> bool:
    """Whether the cache is of a kind whose layers we replace, and its memory is not there yet."""
    there = (type(layer) is StaticLayer and layer.is_initialized for layer in cache.layers)
    return type(cache) in (DynamicCache, StaticCache) and not cache.offloading and not any(there)


def _is_step(cache: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this is one more token for a static cache that holds its prompt: all that matters is on the device, which nobody waits for."""
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    first: Any = next(iter(getattr(cache, "layers", ())), None)
    return isinstance(first, StaticPlanLayer) and first.is_prefilled and inputs.shape[1] == 1


def _law_tokens(decoder: nn.Module, cache: Any, kwargs: dict[str, Any], ragged: bool) -> Int[Tensor, " B"]:
    """Length of each row's prompt, fixed at the first prefill and kept with the cache.

    Raises:
        SpecError: a second chunk of a prompt comes that was not announced, or the cache belongs to another batch.
    """
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    batch_size, q_len = inputs.shape[:2]
    known: Tensor | None = getattr(cache, _LAW, None)
    if known is not None and torch.compiler.is_compiling():
        return known
    past, prompt = int(cache.get_seq_length()), getattr(cache, _PROMPT, None)
    if past == 0 and ragged and _may_be_ours(cache):
        install_layers(decoder, cache)
    layers = [layer for layer in cache.layers if isinstance(layer, PlanCacheLayer | StaticPlanLayer)]
    if layers and past > 0:
        known = layers[0].law_tokens  # reordered with the rows
    if layers and 0 < past < (prompt or 0):
        _check_prompt_is_kept(decoder)
    if known is None or past == 0 or (prompt is not None and past < prompt):
        known = _real_tokens(kwargs.get("attention_mask"), batch_size, past + q_len)
        if prompt is not None:
            known = known + max(0, prompt - past - q_len)
        setattr(cache, _LAW, known)
        for layer in layers:
            layer.law_tokens = known
    elif (
        q_len > 1
        and getattr(cache, _ONLY_PREFILLED, False)
        and not any(layer.cropped for layer in layers if isinstance(layer, PlanCacheLayer))
    ):
        _check_laws_are_constant(decoder, prompt)
    setattr(cache, _ONLY_PREFILLED, q_len > 1)
    if len(known) != batch_size:
        raise SpecError(f"the cache was made for a batch of {len(known)}, but {batch_size} rows came. Use a new cache.")
    return known


def _check_prompt_is_kept(decoder: nn.Module) -> None:
    """A chunk of a prompt may need keys that the rules of the generated tokens have dropped already.

    Raises:
        SpecError: some KV head drops by another rule than its prompt's.
    """
    for binding in (binding_of(module) for module in decoder.modules()):
        if binding is not None and any(
            isinstance(kept, SinkWindow | Zero | MeanValue) and kept != rule
            for rule, kept in zip(binding.rules, binding.kept_by, strict=True)
        ):
            raise SpecError(
                f"{binding.path}: a prompt must come in one call where keys are dropped by another rule while tokens are generated, but it "
                "comes in chunks. Do not pass prefill_chunk_size, or apply the plan with cache=False."
            )


def _check_laws_are_constant(decoder: nn.Module, prompt_tokens: int | None) -> None:
    bindings = (binding_of(module) for module in decoder.modules())
    if prompt_tokens is None and any(binding.length_dependent for binding in bindings if binding is not None):
        raise SpecError(
            "the prompt's length must be known before its first chunk, because this plan has rules that grow with it, but a second "
            f"chunk of a prompt came. Pass {CACHE_KEYWORD}=sparsesearch.sparse_cache(model, prompt_tokens=input_ids.shape[1])."
        )


def _real_tokens(mask: Any, batch_size: int, seen: int) -> Int[Tensor, " B"]:
    """Tokens of each row that are not padding, on the CPU: they decide shapes."""
    if isinstance(mask, dict):  # one per layer type
        mask = next(iter(mask.values()))
    if isinstance(mask, Tensor) and is_mask_code(mask):  # made by `generate` for a static cache
        return mask[:, 0, 0, :-1].amax(1).long().cpu()
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask[:, :seen] != 0).sum(1).cpu()
    return torch.full((batch_size,), seen)


def forget_selections(decoder: nn.Module, args: tuple[Any, ...]) -> None:
    """Before a forward pass: no selection of an earlier one may be reused. A forward-pre-hook of plans with reuse."""
    for module in decoder.modules():
        binding = binding_of(module)
        if binding is not None and binding.leaves is not None:
            binding.leaves.clear()


def release_selections(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After a forward pass: free them, unless gradient checkpointing may run layers again. A forward-hook of plans with reuse."""
    if not torch.is_grad_enabled():
        forget_selections(decoder, args)


def sparse_cache(
    model: PreTrainedModel, *, prompt_tokens: int | None = None, max_tokens: int | None = None
) -> DynamicCache | StaticCache:
    """A cache to pass as `cache=` (`past_key_values=` before transformers 5.24); `generate` makes one itself where neither argument is needed.

    Args:
        model: a model that runs a plan.
        prompt_tokens: width of the whole prompt, padding included: `input_ids.shape[1]`. Needed when a prompt comes in chunks and the plan
            has rules that grow with it.
        max_tokens: slots of the longest sequence, padding and new tokens included; the cache is static then, as `DecodeStep` and
            torch.compile need it.

    Raises:
        SpecError: a number is not positive, or the prompt does not fit.
    """
    for name, number in (("prompt_tokens", prompt_tokens), ("max_tokens", max_tokens)):
        if number is not None and number < 1:
            raise SpecError(f"{name} >= 1 must hold, but got {number}.")
    if max_tokens is not None and (prompt_tokens or 0) > max_tokens:
        raise SpecError(f"prompt_tokens <= max_tokens must hold, but got {prompt_tokens} and {max_tokens}.")
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if max_tokens is None else StaticCache(config, max_cache_len=max_tokens)
    if prompt_tokens is not None:
        setattr(cache, _PROMPT, prompt_tokens)
    return cache
