"""An attention processor's own code with its attention primitive replaced.

Wrapping a processor does not do: `Attention.forward` drops keywords that a wrapper's signature hides (rotary embeddings are lost), and a
registered backend of ours would be wiped by `set_attention_backend`. So the processor's code object runs unchanged, in a copy of its module's
globals where only the primitive is ours: `dispatch_attention_fn`, or `scaled_dot_product_attention` of the module's `F`. The result is an
instance of the original class that shares its attributes.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from sparsesearch.errors import UnsupportedModelError


class Attend(Protocol):
    """Answers one attention call on [B, H, S, D], or None for the model's own attention."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor | None:
        """Heads first; `mask` and `scale` as the primitive got them."""


def specialise(processor: Any, attend: Attend) -> Any:
    """A processor like `processor` whose attention asks `attend` first.

    Raises:
        UnsupportedModelError: its code calls neither of the two primitives.
    """
    kind = type(processor)
    function: Any = inspect.unwrap(kind.__call__)
    names = set(function.__code__.co_names)
    own = dict(function.__globals__)
    own.pop("__name__", None)  # else torch.compile resolves globals in the original module
    if "dispatch_attention_fn" in names:
        own["dispatch_attention_fn"] = _dispatching(own["dispatch_attention_fn"], attend)
    elif {"F", "scaled_dot_product_attention"} <= names:
        own["F"] = _Functional(attend)
    else:
        raise UnsupportedModelError(
            f"the attention processor {kind.__name__} must call dispatch_attention_fn or F.scaled_dot_product_attention, but calls neither. "
            "Set one of the processors that diffusers itself gives this model."
        )
    call = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    call.__kwdefaults__ = function.__kwdefaults__
    call.__annotations__ = function.__annotations__
    specialised = type(f"Sparse{kind.__name__}", (kind,), {"__call__": call, "__module__": __name__})
    _register_like(kind, specialised)
    copy: Any = object.__new__(specialised)
    copy.__dict__ = processor.__dict__  # shared: set_attention_backend reaches both
    return copy


def _dispatching(original: Callable[..., Tensor], attend: Attend) -> Callable[..., Tensor]:
    """Diffusers' primitive, [B, S, H, D]."""

    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        answer = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, scale)
        if answer is not None:
            if parallel_config is not None:
                raise UnsupportedModelError(
                    "a sparse plan must see the whole sequence, but context parallelism splits it. Disable parallelism for this model."
                )
            return answer.transpose(1, 2)
        rest = (attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs)
        return original(query, key, value, *rest, backend=backend, parallel_config=parallel_config)

    return dispatch_attention_fn


class _Functional:
    """torch.nn.functional with its attention, [B, H, S, D], replaced."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def scaled_dot_product_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        answer = self._attend(query, key, value, attn_mask, kwargs.get("scale"))
        if answer is not None:
            return answer
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)


def _register_like(kind: type, specialised: type) -> None:
    """Caches of diffusers look processors up by their exact class: what they know about the original holds for ours."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        AttentionProcessorRegistry.register(specialised, AttentionProcessorRegistry.get(kind))
    except ValueError:
        return  # they do not know the original either
