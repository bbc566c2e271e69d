"""Decoder layers through torch.compile, one compiled graph for all of equal structure (regional compilation).

What differs from layer to layer are tensors on the cache and on the module, never numbers in the code: the layer's index is not read.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from sparsesearch.errors import UnsupportedModelError
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD


class LayerCache:
    """A cache as one decoder layer sees it: whatever index it asks for, it gets its own."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """What `Cache.update` returns for this layer."""
        pair: tuple[Any, Any] = self.layer.update(key_states, value_states)
        return pair


@contextmanager
def layers_compiled(model: PreTrainedModel, cache: Cache, backend: str) -> Iterator[None]:
    """Within the block, send each decoder layer through one compiled function, with its own cache in the place of the whole."""
    layers, run = decoder_layers(model), compiled_alike(_run_layer, backend)
    try:
        for layer in layers:
            own: Any = layer.self_attn
            layer.forward = functools.partial(_through, run, layer, LayerCache(cache.layers[own.layer_idx]))
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _through(run: Any, layer: nn.Module, own: LayerCache, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return run(layer, hidden, *args, **{**kwargs, CACHE_KEYWORD: own})


@functools.cache
def compiled_alike(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`function` compiled so that modules which differ only in the number of their layer share one graph."""
    run = torch.compile(function, backend=backend, fullgraph=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # the index of a layer stays a number that nobody reads, instead of one graph for each
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=64):
            return run(*args, **kwargs)

    return call


def _run_layer(layer: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, hidden, *args, **kwargs)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a decoder, outermost list first.

    Raises:
        UnsupportedModelError: there is no list of layers with `self_attn`.
    """
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and len(part) and all(hasattr(layer, "self_attn") for layer in part):
            return list(part)
    raise UnsupportedModelError(
        f"{type(model).__name__} must have a list of decoder layers to compile them, but has none. Pass compiled=False."
    )
