"""Where a transformer keeps its heads and FFN channels: the projections around them, layer by layer, whatever the family calls them."""

from dataclasses import dataclass

from torch import nn

from sparsesearch.errors import UnsupportedModelError


@dataclass(frozen=True)
class Layout:
    """Names relative to a layer: projections into a sublayer, the projection out of it, and the module that holds the heads.

    `post_norm`: the FFN reads the residual stream itself, because the norm comes after the sum (BERT).
    """

    into: tuple[str, ...]
    out: str
    holder: str
    post_norm: bool = False


# family examples: Llama, Qwen2, Qwen3, Mistral; ViT; BERT, RoBERTa
_ATTENTION = (
    Layout(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", "self_attn"),
    Layout(("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj", "attention"),
    Layout(("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense", "attention.self"),
)  # fmt: skip
_FEED_FORWARD = (
    Layout(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "mlp"),
    Layout(("mlp.fc1",), "mlp.fc2", "mlp"),
    Layout(("intermediate.dense",), "output.dense", "intermediate", post_norm=True),
)


@dataclass(frozen=True)
class Layer:
    """One layer of a model's stack.

    Attributes:
        path: dotted path in the model.
        module: the layer.
        attention: names of its attention; None when it has none (any more).
        feed_forward: names of its FFN; None when it has none (any more).
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: elements per head.
        num_channels: FFN channels.
    """

    path: str
    module: nn.Module
    attention: Layout | None
    feed_forward: Layout | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_channels: int

    def projection(self, name: str) -> nn.Linear:
        """A projection by its name relative to the layer."""
        found = self.module.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found

    @property
    def sublayers(self) -> tuple[tuple[str, Layout], ...]:
        """(`attention` or `feed_forward`, names) of what the layer has, in the order of the data flow."""
        both = (("attention", self.attention), ("feed_forward", self.feed_forward))
        return tuple((kind, layout) for kind, layout in both if layout is not None)


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """The layers of the only stack whose projections are plain `nn.Linear` under names that are known.

    Raises:
        UnsupportedModelError: there is no such stack, or more than one.
    """
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_has_a_sublayer(layer) for layer in module)
    ]
    if len(stacks) != 1:
        raise UnsupportedModelError(
            f"a model must have one stack of layers with projections that pruning knows (Llama, Qwen2, Qwen3, Mistral, BERT, ViT), but "
            f"{type(model).__name__} has {len(stacks)}. Choose another model."
        )
    ((path, stack),) = stacks
    return tuple(_layer(f"{path}.{index}", layer) for index, layer in enumerate(stack))


def _has_a_sublayer(layer: nn.Module) -> bool:
    return any(_fitting(layer, layouts) is not None for layouts in (_ATTENTION, _FEED_FORWARD))


def _fitting(layer: nn.Module, layouts: tuple[Layout, ...]) -> Layout | None:
    names = dict(layer.named_modules())
    for layout in layouts:
        if all(isinstance(names.get(name), nn.Linear) for name in (*layout.into, layout.out)):
            return layout
    return None


def _layer(path: str, module: nn.Module) -> Layer:
    attention, feed_forward = _fitting(module, _ATTENTION), _fitting(module, _FEED_FORWARD)
    num_heads = num_kv_heads = head_dim = 0
    if attention is not None:
        holder = module.get_submodule(attention.holder)
        head_dim = int(getattr(holder, "head_dim", 0) or getattr(holder, "attention_head_size", 0))
        sizes = [_linear(module, name).out_features for name in attention.into]
        num_heads, num_kv_heads = sizes[0] // head_dim, sizes[1] // head_dim
    num_channels = 0 if feed_forward is None else _linear(module, feed_forward.out).in_features
    return Layer(path, module, attention, feed_forward, num_heads, num_kv_heads, head_dim, num_channels)


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    found = layer.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found
