"""Recognise decoder layers whose single-token step can be fused: RMS norms, q/k/v/o and a gated MLP, as Llama, Qwen and Mistral have them.

Recognised by parts, not by the model's name: exactly these children, with or without biases and norms of queries and keys. What a layer does
beyond its parts (a multiplier on the residual, say) cannot be seen here; `DecodeStep` computes its first step both ways for that.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsesearch.errors import UnsupportedModelError
from sparsesearch.runtime.joined_linears import JoinedLinear, join_linears

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}


@dataclass(frozen=True)
class Product:
    """Weights [N, K] and biases [N] of one product."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Norm:
    """An RMS norm."""

    gain: Tensor
    eps: float


@dataclass(frozen=True)
class FusedLayer:
    """What one layer is made of.

    Attributes:
        attention: the attention module, for whoever answers its call.
        index: of its cache.
        before_attention: norm of the residual.
        qkv: queries, keys and values in one product.
        q_norm: norm per query head.
        k_norm: likewise.
        output: product after attention.
        before_mlp: norm of the residual.
        gate_up: all gates, then all values.
        down: product after them.
    """

    attention: Any
    index: int
    before_attention: Norm
    qkv: Product
    q_norm: Norm | None
    k_norm: Norm | None
    output: Product
    before_mlp: Norm
    gate_up: Product
    down: Product


@dataclass(frozen=True)
class FusedDecoder:
    """A decoder whose layers are all recognised.

    Attributes:
        embedding: tokens to rows.
        rotary: positions to cos and sin.
        layers: in order.
        norm: the last one.
        head: product onto the vocabulary.
    """

    embedding: nn.Module
    rotary: nn.Module
    layers: tuple[FusedLayer, ...]
    norm: Norm
    head: Product


def recognise(model: PreTrainedModel) -> FusedDecoder:
    """Lay the weights of linears with one input side by side (in place) and say what the model is made of.

    Raises:
        UnsupportedModelError: some part is not one that the fused step knows.
    """
    decoder: Any = model.base_model
    _expect(decoder, _DECODER)
    norm, head = _norm(decoder.norm), _product(model.get_output_embeddings())
    for layer in decoder.layers:  # before anything is moved
        _check_layer(layer)
    join_linears(decoder, biased=True)
    return FusedDecoder(
        embedding=decoder.embed_tokens,
        rotary=decoder.rotary_emb,
        layers=tuple(_layer(layer) for layer in decoder.layers),
        norm=norm,
        head=head,
    )


def _check_layer(layer: Any) -> None:
    _expect(layer, _LAYER)
    attention, mlp = layer.self_attn, layer.mlp
    _expect(attention, _ATTENTION, _HEAD_NORMS)
    _expect(mlp, _MLP)
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        raise _unknown(f"the gate's activation is {type(mlp.act_fn).__name__}, not SiLU")
    window = (
        attention.sliding_window
        if hasattr(attention, "sliding_window")
        else getattr(attention.config, "sliding_window", None)
    )
    if window is not None:
        raise _unknown("an attention has a sliding window")
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        _norm(norm)
    for norm in (getattr(attention, name, None) for name in _HEAD_NORMS):
        if norm is not None:
            _norm(norm, attention.head_dim)
    for linear in (attention.o_proj, mlp.down_proj):
        _product(linear)
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        parts = [getattr(attention if names[0] == "q_proj" else mlp, name) for name in names]
        if len({(type(part), part.weight.dtype, part.bias is None) for part in parts}) > 1:
            raise _unknown(f"{', '.join(names)} are not of one kind")
        for part in parts:
            _product(part)


def _layer(layer: Any) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return FusedLayer(
        attention=attention,
        index=attention.layer_idx,
        before_attention=_norm(layer.input_layernorm),
        qkv=_joined(attention.q_proj),
        q_norm=None if q_norm is None else _norm(q_norm),
        k_norm=None if k_norm is None else _norm(k_norm),
        output=_product(attention.o_proj),
        before_mlp=_norm(layer.post_attention_layernorm),
        gate_up=_joined(mlp.gate_proj),
        down=_product(mlp.down_proj),
    )


def _joined(first: Any) -> Product:
    if not isinstance(first, JoinedLinear) or first.joined.data_ptr() != first.weight.data_ptr():
        raise _unknown(
            "linears with one input do not lie side by side (the model was moved or copied after they were joined)"
        )
    return Product(first.joined, first.joined_bias)


def _product(linear: Any) -> Product:
    if type(linear) not in (nn.Linear, JoinedLinear) or _is_hooked(linear):
        raise _unknown(f"a linear is {type(linear).__name__}, or has hooks")
    return Product(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _norm(norm: Any, size: int | None = None) -> Norm:
    gain, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(gain, Tensor) or eps is None or gain.dim() != 1 or _is_hooked(norm) or list(norm.children()):
        raise _unknown(f"a norm is {type(norm).__name__}, not an RMS norm")
    if size is not None and len(gain) != size:
        raise _unknown(f"a norm of heads has {len(gain)} weights, not one per column of a head")
    return Norm(gain.detach(), float(eps))


def _expect(module: Any, names: AbstractSet[str], optional: AbstractSet[str] = frozenset()) -> None:
    found = {name for name, _ in module.named_children()}
    if not names <= found <= names | optional or _is_hooked(module):
        raise _unknown(f"{type(module).__name__} has {', '.join(sorted(found)) or 'no parts'}, or hooks")


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or hasattr(module, "_hf_hook"))


def _unknown(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a fused step needs layers of RMS norms, q/k/v/o and a gated SiLU MLP as Llama's and Qwen's, but {what}. Pass fused=False."
    )
