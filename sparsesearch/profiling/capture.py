"""One forward pass that keeps every layer's queries, keys, values and attention output, with gradients on the outputs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsesearch.errors import UnsupportedModelError

NAME = "sparsesearch_profile"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in one pass over one sequence.

    Attributes:
        q: queries, rotated, multiplied by the softmax scale.
        k: keys, rotated.
        v: values.
        out: attention output before the output projection, part of the autograd graph.
        sliding_window: the model's own window in tokens, or None.
    """

    module: nn.Module
    q: Float[Tensor, "H S D"]
    k: Float[Tensor, "G S D"]
    v: Float[Tensor, "G S D"]
    out: Float[Tensor, "1 S H D"]
    sliding_window: int | None


@dataclass
class _Recording:
    implementation: str
    calls: list[AttentionCall] = field(default_factory=list)


_ACTIVE: ContextVar[_Recording] = ContextVar("sparsesearch_recording")


def _recording_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    recording = _ACTIVE.get()
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"attention must be a plain softmax, but {type(module).__name__} uses {name}, which no rule models. "
                "Choose a model without it."
            )
    out, weights = ALL_ATTENTION_FUNCTIONS[recording.implementation](
        module, query, key, value, attention_mask, **kwargs
    )
    scale = kwargs.get("scaling") or 1 / math.sqrt(query.shape[-1])
    recording.calls.append(
        AttentionCall(
            module=module,
            q=query[0].detach() * scale,
            k=key[0].detach(),
            v=value[0].detach(),
            out=out,
            sliding_window=kwargs.get("sliding_window"),
        )
    )
    return out, weights


def _recording_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return ALL_MASK_ATTENTION_FUNCTIONS[_ACTIVE.get().implementation](*args, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register(NAME, _recording_attention)
AttentionMaskInterface.register(NAME, _recording_mask)


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[AttentionCall]]:
    """Record every attention call made inside; what the model ran before (dense or a plan) is what runs.

    Yields:
        The calls, in the order in which the layers ran.
    """
    implementation = model.config._attn_implementation
    recording = _Recording("sdpa" if implementation == "eager" else implementation)
    token = _ACTIVE.set(recording)
    model.set_attn_implementation(NAME)
    try:
        yield recording.calls
    finally:
        model.set_attn_implementation(implementation)
        _ACTIVE.reset(token)


def logits_and_calls(
    model: PreTrainedModel, input_ids: torch.Tensor
) -> tuple[Float[Tensor, "S V"], list[AttentionCall]]:
    """Run one sequence of S tokens with gradients.

    Raises:
        UnsupportedModelError: no layer went through the attention interface.
    """
    with recorded(model) as calls, torch.enable_grad():
        logits = model(input_ids=input_ids[None].to(model.device), use_cache=False).logits[0]
    if not calls:
        raise UnsupportedModelError(
            f"{type(model).__name__} must run its attention through transformers' AttentionInterface, but no layer did. "
            "`sparsesearch models` lists the families that do."
        )
    return logits, list(calls)


def forward_calls(model: PreTrainedModel, input_ids: torch.Tensor) -> list[AttentionCall]:
    """Run one sequence without gradients and without the output head's result."""
    with recorded(model) as calls, torch.no_grad():
        model(input_ids=input_ids[None].to(model.device), use_cache=False)
    return list(calls)
