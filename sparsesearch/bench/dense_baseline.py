"""The strong dense baseline: cuDNN's attention, forced, on exactly the keys there are, in transformers' static cache.

Stock transformers would be slower: its masks keep static caches away from cuDNN, and repeat the keys of grouped queries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, StaticCache

from sparsesearch.bench.meter import Stamps, timed

_NAME = "sparsesearch_bench_dense"


@dataclass
class DenseAttention:
    """Causal attention over the first `tokens` slots of the cache, by cuDNN on a GPU.

    Attributes:
        tokens: slots that are written, the present call's included.
        stamps: start and end of every prefill call.
    """

    tokens: int = 0
    stamps: Stamps = field(default_factory=list)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Answer transformers' attention call."""
        if query.shape[2] == 1:
            return dense_attention(query, key, value, self.tokens, scaling).transpose(1, 2), None
        with timed(self.stamps, query.device):
            out = _cudnn(query, key, value, self.tokens, scaling)
        return out.transpose(1, 2).contiguous(), None


def _cudnn(q: Tensor, k: Tensor, v: Tensor, tokens: int, scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH):
        k, v = k[:, :, :tokens], v[:, :, :tokens]
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=True)


@torch.library.custom_op("sparsesearch::bench_dense_attention", mutates_args=())
def dense_attention(q: Tensor, k: Tensor, v: Tensor, tokens: int, scale: float) -> Tensor:
    """Attention over the first `tokens` keys; an operator, so that a compiled layer calls cuDNN as it is."""
    return _cudnn(q, k, v, tokens, scale).contiguous()


@dense_attention.register_fake
def _dense_attention_shape(q: Tensor, k: Tensor, v: Tensor, tokens: int, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@contextmanager
def dense(model: PreTrainedModel) -> Iterator[DenseAttention]:
    """Run the model with this attention."""
    attention, before = DenseAttention(), model.config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, _no_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield attention
    finally:
        model.set_attn_implementation(before)


def _no_mask(**_: Any) -> None:
    """The batch is unpadded, and the attention knows how many slots are written."""


def repeated(cache: StaticCache, batch: int) -> None:
    """Let a static cache of one sequence hold it `batch` times."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            setattr(layer, name, getattr(layer, name).repeat_interleave(batch, 0))
        layer.batch_size = batch  # type: ignore[union-attr]
