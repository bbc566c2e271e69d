"""One token through a recognised decoder: seven launches per layer, and every weight read once at the memory's pace.

    product      norm, queries, keys, values                           kernels.step_ops
    rotation     norms of heads, positions, the cache's new row        likewise
    attention    a static plan layer's own two kernels, or whatever attention the model is set to on another static cache
    product      output, residual                                      kernels.step_ops
    product      norm, gate and up, SiLU(gate) · up                    likewise
    product      down, residual                                        likewise

Sums are kept in fp32 from the product to the end of each kernel; the plain modules round to the model's type in between.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsesearch.errors import UnsupportedModelError
from sparsesearch.kernels.step_ops import MOST_ROWS, rotate, rotate_append, scale_rows, skinny_linear
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.compiled_layers import compiled_alike
from sparsesearch.runtime.fused_layers import FusedLayer, Product, recognise
from sparsesearch.runtime.static_layer import StaticPlanLayer

DTYPES = (
    torch.bfloat16,
    torch.float32,
)  # an input is scaled by its norm's gain before it is divided by its size: too large for float16


class FusedStep:
    """The step of `DecodeStep`, fused.

    Args:
        model: a model whose decoder `fused_layers.recognise` knows.
        cache: a static cache that holds its prompts.
        batch: rows, at most MOST_ROWS.
        backend: of torch.compile, for the attention of layers with a cache of another kind; None: as it is.

    Raises:
        UnsupportedModelError: the model, its type or the batch is not one that the kernels serve.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int, *, backend: str | None = None) -> None:
        if batch > MOST_ROWS or model.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"a fused step serves at most {MOST_ROWS} rows of bfloat16 or float32, but got {batch} of {model.dtype}. Pass fused=False."
            )
        self.model, self.cache, self.decoder = model, cache, recognise(model)
        self._attend = attend_other if backend is None else compiled_alike(attend_other, backend)
        layers: list[Any] = cache.layers
        if any(isinstance(layer, StaticPlanLayer) and not layer.kernel for layer in layers):
            raise UnsupportedModelError(
                "a fused step needs an attention kernel, but the plan runs on another backend. Pass fused=False."
            )

    def __call__(self, tokens: Int[Tensor, "B one"], positions: Int[Tensor, "B one"]) -> Float[Tensor, "B V"]:
        """Logits; the cache takes the tokens in."""
        decoder = self.decoder
        embedded: Tensor = decoder.embedding(tokens)
        cos, sin = (angle[:, 0].expand(len(tokens), -1).contiguous() for angle in decoder.rotary(embedded, positions))
        mask = self._mask(embedded, positions)
        hidden, following = embedded[:, 0].contiguous(), [layer.before_attention for layer in decoder.layers[1:]]
        scaled, squares = scale_rows(hidden, decoder.layers[0].before_attention.gain)
        for layer, then in zip(decoder.layers, [*following, decoder.norm], strict=True):
            qkv = _linear(scaled, layer.qkv, squares=squares, eps=layer.before_attention.eps)[0]
            attended = self._attention(layer, qkv, cos, sin, mask)
            hidden, scaled, squares = _linear(attended, layer.output, add=hidden, gain=layer.before_mlp.gain)
            inner = _linear(scaled, layer.gate_up, squares=squares, eps=layer.before_mlp.eps, paired=True)[0]
            hidden, scaled, squares = _linear(inner, layer.down, add=hidden, gain=then.gain)
        return _linear(scaled, decoder.head, squares=squares, eps=decoder.norm.eps)[0]

    def _mask(self, embedded: Tensor, positions: Tensor) -> Any:
        """What the model would hand to its attention; a plan's layers know what they see."""
        if isinstance(self.cache.layers[0], StaticPlanLayer):
            return None
        inputs = {
            "inputs_embeds": embedded,
            "attention_mask": None,
            CACHE_KEYWORD: self.cache,
            "position_ids": positions,
        }
        return create_causal_mask(config=self.model.config.get_text_config(), **inputs)

    def _attention(
        self, layer: FusedLayer, qkv: Float[Tensor, "B width"], cos: Tensor, sin: Tensor, mask: Any
    ) -> Float[Tensor, "B width"]:
        cache: Any = self.cache.layers[layer.index]
        q_gain, k_gain = (None if norm is None else norm.gain for norm in (layer.q_norm, layer.k_norm))
        eps, num_heads = 0.0 if layer.q_norm is None else layer.q_norm.eps, layer.output.weight.shape[1] // cos.shape[1]
        turn = qkv, cos, sin, q_gain, k_gain, eps, num_heads
        if not isinstance(cache, StaticPlanLayer):
            q, k, v = (x[:, :, None] for x in rotate(*turn))
            out: Tensor = self._attend(layer.attention, cache, q, k, v, mask)
            return out.reshape(len(qkv), -1)
        reads, scale = cache.reads, layer.attention.scaling
        q = rotate_append(
            *turn, cache.keys, cache.values, cache.layout.start, *cache.layout.limits, cache.seen, reads.lens, cache.slots,
            cache.binding.block_tokens,
        )  # fmt: skip
        values = qkv.view(len(qkv), -1, cos.shape[1])[:, -(cache.seen.numel() // len(qkv)) :]
        return reads.attend(q, values, cache.keys, cache.values, cache.seen, scale, True).view(len(qkv), -1)


def attend_other(module: Any, cache: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Float[Tensor, "B one H D"]:
    """Take one token into a cache of transformers', and attend as the model is set to."""
    keys, values = cache.update(k, v)
    attention: Any = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, sdpa_attention_forward)
    out: Tensor = attention(module, q, keys, values, mask, dropout=0.0, scaling=module.scaling)[0]
    return out


def _linear(
    x: Tensor,
    product: Product,
    *,
    add: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gain: Tensor | None = None,
    paired: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = skinny_linear(x, product.weight, product.bias, add, squares, gain, eps, paired)
    return out
