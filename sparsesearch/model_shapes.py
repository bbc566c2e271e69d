"""Decoder language models by name: their sizes, without their weights.

For predictions and for benchmarks with random weights, whose time does not depend on what the weights are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsesearch.errors import SpecError, nearest
from sparsesearch.shapes import ModelGeometry


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with grouped-query attention, rotary positions and a gated MLP.

    Attributes:
        name: as users call it.
        model_type: transformers' name of the architecture.
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_heads: query heads per layer.
        num_kv_heads: KV heads per layer.
        head_dim: width of a head.
        vocab_size: tokens of the vocabulary.
        tied_embeddings: whether input and output embeddings are one tensor.
        rope_theta: base of the rotary positions.
        max_tokens: longest sequence the released model was trained for.
        qk_norm: whether queries and keys are normalised per head.
    """

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    rope_theta: float
    max_tokens: int
    qk_norm: bool = False

    @property
    def geometry(self) -> ModelGeometry:
        """Head counts, with the module paths that transformers gives such a model."""
        layers = range(self.num_layers)
        return ModelGeometry(
            modules=tuple(f"model.layers.{layer}.self_attn" for layer in layers),
            num_heads=(self.num_heads,) * self.num_layers,
            num_kv_heads=(self.num_kv_heads,) * self.num_layers,
            head_dim=(self.head_dim,) * self.num_layers,
        )

    @property
    def layer_matmul_parameters(self) -> int:
        """Weights of one layer's seven projections; a token costs twice as many floating-point operations in them."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        """Weights of the output projection onto the vocabulary."""
        return self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """All weights, norms included."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.head_parameters * (1 if self.tied_embeddings else 2)
        return self.num_layers * (self.layer_matmul_parameters + norms) + embeddings + self.hidden_size

    def config_settings(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `AutoConfig.for_model(model_type, ...)`."""
        return {
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied_embeddings,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "max_position_embeddings": self.max_tokens,
        }


MODEL_SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("llama3-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, False, 5e5, 131072),
        ModelShape("llama3-70b", "llama", 80, 8192, 28672, 64, 8, 128, 128256, False, 5e5, 131072),
        ModelShape("qwen3-4b", "qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True, 1e6, 40960, qk_norm=True),
        ModelShape("smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64, 49152, True, 1e5, 8192),
    )
}
"""Sizes from the released models' config.json: Llama 3.1 8B and 70B, Qwen3 4B, SmolLM2 135M."""


def model_shape(name: str) -> ModelShape:
    """The shape of that name.

    Raises:
        SpecError: there is none.
    """
    if name not in MODEL_SHAPES:
        raise SpecError(f"unknown model shape {name!r}.{nearest(name, tuple(MODEL_SHAPES))}")
    return MODEL_SHAPES[name]


def shape_of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a transformers `config.json` describes; of its text model, if it has several parts.

    Raises:
        SpecError: a size is missing.
    """
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, Mapping) else config
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    missing = [field for field in needed if not isinstance(text.get(field), int)]
    if missing:
        raise SpecError(
            f"the config of {name} must state {', '.join(missing)}, but does not. Name a model shape instead."
        )
    heads = text["num_attention_heads"]
    rope = text.get("rope_parameters") or {}
    return ModelShape(
        name=name,
        model_type=str(text.get("model_type", "llama")),
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocab_size=text["vocab_size"],
        tied_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e4))),
        max_tokens=int(text.get("max_position_embeddings", 0)) or 1 << 17,
        qk_norm=str(text.get("model_type", "")).startswith(("qwen3", "gemma3")),
    )


def heads_alone(name: str, geometry: ModelGeometry) -> ModelShape:
    """A model of which only the attention is known: everything else has width 0.

    Raises:
        SpecError: its layers have different heads.
    """
    heads = set(zip(geometry.num_heads, geometry.num_kv_heads, geometry.head_dim, strict=True))
    if len(heads) != 1:
        raise SpecError(f"all layers must have the same heads for a prediction, but those of {name} differ.")
    ((num_heads, num_kv_heads, head_dim),) = heads
    layers = len(geometry.modules)
    return ModelShape(name, "attention", layers, 0, 0, num_heads, num_kv_heads, head_dim, 0, True, 1e4, 1 << 30)
