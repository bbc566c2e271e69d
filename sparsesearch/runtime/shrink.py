"""Making a model's layers narrower, as modules (shapes) and as weights (slices)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsesearch.cut import Cut, LayerCut
from sparsesearch.errors import PlanMismatchError
from sparsesearch.runtime.sublayers import Layer, Layout, layers_of

Undo = Callable[[], None]


@dataclass(frozen=True)
class LayerSizes:
    """A layer after a cut. Projections out of a sublayer have a bias where the flag says so or the stock architecture does."""

    num_heads: int
    num_kv_heads: int
    num_channels: int
    attention_bias: bool
    feed_forward_bias: bool


@dataclass(frozen=True)
class Fitted:
    """A projection after compensation: all rows and columns, those of removed inputs zero; and a bias or None."""

    weight: Float[Tensor, "O I"]
    bias: Float[Tensor, " O"] | None


class Constant(nn.Module):
    """A projection out of nothing: its bias, or zero."""

    def __init__(self, like: nn.Linear, bias: bool) -> None:
        super().__init__()
        own = like.weight.new_zeros(like.out_features) if bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if own is None else nn.Parameter(own))

    def forward(self, x: Tensor) -> Tensor:
        """A value that broadcasts against the residual stream."""
        return x.new_zeros(()) if self.bias is None else self.bias


class NoHeads(nn.Module):
    """What is left of a module whose heads are all gone: its output projection, if that was inside."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Same outputs as the module it replaces, without attention weights."""
        out = getattr(self, "o_proj", None)
        return (hidden_states if out is None else out(hidden_states)), None


def shrink(model: nn.Module, sizes: Mapping[int, LayerSizes]) -> list[Undo]:
    """Replace projections by narrower, uninitialised ones, in place; layer indices of caches stay compact.

    Args:
        model: a stock model; meta tensors are fine.
        sizes: layer index -> what it is to have. Layers that are not named stay as they are.

    Returns:
        What restores the model, to be called in reverse order.
    """
    undo: list[Undo] = []
    layers, attending = layers_of(model), 0
    for index, layer in enumerate(layers):
        size = sizes.get(index)
        if size is not None and layer.attention is not None:
            _shrink_heads(layer, layer.attention, size, undo)
        if size is not None and layer.feed_forward is not None:
            _shrink_channels(layer, layer.feed_forward, size, undo)
        if layer.attention is not None and (size is None or size.num_heads):
            holder = layer.module.get_submodule(layer.attention.holder)
            # the cache's length is read from its first layer, which must therefore belong to an attention that exists
            if isinstance(getattr(holder, "layer_idx", None), int):
                _set(holder, "layer_idx", attending, undo)
            attending += 1
    return undo


def _shrink_heads(layer: Layer, layout: Layout, size: LayerSizes, undo: list[Undo]) -> None:
    out = layer.projection(layout.out)
    bias = size.attention_bias or out.bias is not None
    if size.num_heads == 0:
        rest, constant = NoHeads(), Constant(out, bias)
        if layout.out.startswith(f"{layout.holder}."):
            rest.add_module("o_proj", constant)
        else:
            _replace(layer.module, layout.out, constant, undo)
        _replace(layer.module, layout.holder, rest, undo)
        return
    holder = layer.module.get_submodule(layout.holder)
    widths = (size.num_heads, size.num_kv_heads, size.num_kv_heads)
    for name, heads in zip(layout.into, widths, strict=True):
        old = layer.projection(name)
        _replace(layer.module, name, _linear(old, old.in_features, heads * layer.head_dim, old.bias is not None), undo)
    _replace(layer.module, layout.out, _linear(out, size.num_heads * layer.head_dim, out.out_features, bias), undo)
    values = {
        "num_key_value_groups": size.num_heads // size.num_kv_heads,
        "num_attention_heads": size.num_heads,
        "num_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "all_head_size": size.num_heads * layer.head_dim,
    }
    for name, value in values.items():
        if hasattr(holder, name):
            _set(holder, name, value, undo)


def _shrink_channels(layer: Layer, layout: Layout, size: LayerSizes, undo: list[Undo]) -> None:
    out = layer.projection(layout.out)
    bias = size.feed_forward_bias or out.bias is not None
    for name in layout.into:
        old = layer.projection(name)
        narrow = _linear(old, old.in_features, size.num_channels, old.bias is not None) if size.num_channels else None
        _replace(layer.module, name, narrow or nn.Identity(), undo)
    narrow_out = _linear(out, size.num_channels, out.out_features, bias) if size.num_channels else Constant(out, bias)
    _replace(layer.module, layout.out, narrow_out, undo)
    holder = layer.module.get_submodule(layout.holder)
    if hasattr(holder, "intermediate_size"):
        _set(holder, "intermediate_size", size.num_channels, undo)


def _linear(like: nn.Linear, inputs: int, outputs: int, bias: bool) -> nn.Linear:
    device, dtype = like.weight.device, like.weight.dtype
    made: nn.Linear = torch.nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=device, dtype=dtype)
    return made


def _replace(layer: nn.Module, name: str, module: nn.Module, undo: list[Undo]) -> None:
    parent_name, _, child = name.rpartition(".")
    parent = layer.get_submodule(parent_name)
    before = getattr(parent, child)
    module.train(before.training)
    setattr(parent, child, module)
    undo.append(lambda: setattr(parent, child, before))


def _set(module: nn.Module, name: str, value: int, undo: list[Undo]) -> None:
    before = getattr(module, name)
    setattr(module, name, value)
    undo.append(lambda: setattr(module, name, before))


def sizes_of(cut: Cut, fitted: Mapping[str, Fitted], layers: tuple[Layer, ...]) -> dict[int, LayerSizes]:
    """Every layer's sizes after a cut; `fitted` says which projections gain a bias.

    Raises:
        PlanMismatchError: the cut was made for a model of other sizes.
    """
    check_cut(cut, layers)
    found = {}
    for index, own in cut.layers.items():
        layer = layers[index]
        biased = {kind: layout.out in _gains_bias(layer, fitted) for kind, layout in layer.sublayers}
        found[index] = LayerSizes(
            num_heads=len(own.kept_heads),
            num_kv_heads=len(own.kept_groups),
            num_channels=len(own.kept_channels),
            attention_bias=biased.get("attention", False),
            feed_forward_bias=biased.get("feed_forward", False),
        )
    return found


def _gains_bias(layer: Layer, fitted: Mapping[str, Fitted]) -> set[str]:
    return {
        layout.out
        for _, layout in layer.sublayers
        if (new := fitted.get(f"{layer.path}.{layout.out}")) is not None and new.bias is not None
    }


def check_cut(cut: Cut, layers: tuple[Layer, ...]) -> None:
    """Compare a cut with the model it is to be made in.

    Raises:
        PlanMismatchError: names the first layer that differs.
    """
    for index, own in cut.layers.items():
        if index >= len(layers):
            raise PlanMismatchError(
                f"the cut names layer {index}, but this model has {len(layers)} layers. Give its model."
            )
        layer = layers[index]
        want = (own.num_heads, own.num_kv_heads, own.num_channels)
        have = (layer.num_heads, layer.num_kv_heads, layer.num_channels)
        if want != have:
            raise PlanMismatchError(
                f"the cut was made for layer {index} with {want[0]} query heads, {want[1]} KV heads and {want[2]} FFN channels, but this "
                f"model has {have[0]}, {have[1]} and {have[2]} there. Give the model the plan was made for."
            )


def sliced_weights(cut: Cut, fitted: Mapping[str, Fitted], layers: tuple[Layer, ...]) -> dict[str, Tensor]:
    """Tensors of the cut layers' projections, sliced; `path.name.weight` -> values.

    Args:
        cut: what goes.
        fitted: compensated projections by path; the model's own where there is none.
        layers: of the dense model.
    """
    found: dict[str, Tensor] = {}
    for index, own in cut.layers.items():
        layer = layers[index]
        if layer.attention is not None:
            heads = _positions(own.kept_heads, layer.head_dim)
            groups = _positions(own.kept_groups, layer.head_dim)
            rows = dict(zip(layer.attention.into, (heads, groups, groups), strict=True)) if len(heads) else {}
            found |= _sliced(layer, layer.attention, rows, heads, fitted)
        if layer.feed_forward is not None:
            channels = torch.tensor(own.kept_channels, dtype=torch.long)
            rows = dict.fromkeys(layer.feed_forward.into, channels) if len(channels) else {}
            found |= _sliced(layer, layer.feed_forward, rows, channels, fitted)
    return found


def _sliced(
    layer: Layer, layout: Layout, rows: Mapping[str, Tensor], columns: Tensor, fitted: Mapping[str, Fitted]
) -> dict[str, Tensor]:
    found = {}
    for name, kept in rows.items():
        path, own = f"{layer.path}.{name}", _fitted_or_own(layer, name, fitted)
        found[f"{path}.weight"] = own.weight[kept.to(own.weight.device)]
        if own.bias is not None:
            found[f"{path}.bias"] = own.bias[kept.to(own.bias.device)]
    out = layer.projection(layout.out)
    path, new = f"{layer.path}.{layout.out}", _fitted_or_own(layer, layout.out, fitted)
    if len(columns):
        found[f"{path}.weight"] = new.weight[:, columns.to(new.weight.device)].to(out.weight.dtype).contiguous()
    if new.bias is not None:
        found[f"{path}.bias"] = new.bias.to(out.weight.dtype)
    return found


def _fitted_or_own(layer: Layer, name: str, fitted: Mapping[str, Fitted]) -> Fitted:
    own = layer.projection(name)
    return fitted.get(f"{layer.path}.{name}") or Fitted(
        own.weight.detach(), None if own.bias is None else own.bias.detach()
    )


def _positions(heads: tuple[int, ...], head_dim: int) -> Tensor:
    return (torch.tensor(heads, dtype=torch.long)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def layer_cut(layer: Layer, *, heads: tuple[int, ...] = (), channels: tuple[int, ...] = ()) -> LayerCut:
    """The cut of a layer by what goes."""
    return LayerCut(
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        num_channels=layer.num_channels,
        removed_heads=tuple(sorted(heads)),
        removed_channels=tuple(sorted(channels)),
    )
