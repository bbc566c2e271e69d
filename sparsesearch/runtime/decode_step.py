"""One decoding step of a whole model, captured once and replayed: tokens in, logits out, and nothing asked of the host in between.

    cache = sparsesearch.sparse_cache(model, max_tokens=40_000)
    first = model(input_ids, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
    step = DecodeStep(model, cache, first_position=input_ids.shape[1])
    tokens = step.generate(first, 64)

Decoder layers may be compiled: one compiled graph serves all layers of equal structure, because what differs from layer to layer are tensors on
the cache and on the module, never numbers in the code (regional compilation; the layer's index is not read, see `LayerCache`).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from sparsesearch.errors import SpecError, UnsupportedModelError
from sparsesearch.runtime.attention import NAME
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.static_layer import StaticPlanLayer

_WARM_UPS = 2  # the first run compiles kernels, the second shows that nothing is left to compile


class LayerCache:
    """A cache as one decoder layer sees it: whatever index it asks for, it gets its own."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """What `Cache.update` returns for this layer."""
        pair: tuple[Any, Any] = self.layer.update(key_states, value_states)
        return pair


class DecodeStep:
    """A step of `model` on a static cache that holds its prompts.

    Args:
        model: a model that runs a plan (or none, with transformers' own static cache).
        cache: a static cache after its prefill.
        first_position: position of the next token, per row if rows differ: for left-padded prompts their real lengths.
        compiled: compile decoder layers with torch.compile (regional); fewer and larger kernels, at the price of seconds once.
        graph: capture the step into a CUDA graph; needs a GPU.
        backend: of torch.compile.

    Raises:
        SpecError: the cache holds no prompt or is not static, or a graph is wanted on a CPU.
        UnsupportedModelError: `compiled`, but the model has no plain list of decoder layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        *,
        first_position: int | Int[Tensor, " B"],
        compiled: bool = False,
        graph: bool | None = None,
        backend: str = "inductor",
    ) -> None:
        layers: list[Any] = cache.layers
        if not layers or not all(layer.is_compileable and layer.is_initialized for layer in layers):
            raise SpecError(
                "a decoding step needs a static cache that holds a prompt, but this one does not. Make it with "
                "sparsesearch.sparse_cache(model, max_tokens=...) and run the prompt through the model first."
            )
        device = model.device
        self.graph_wanted = device.type == "cuda" if graph is None else graph
        if self.graph_wanted and device.type != "cuda":
            raise SpecError(f"a CUDA graph needs a GPU, but the model is on {device}. Pass graph=False.")
        self.model, self.cache, self.compiled, self.backend = model, cache, compiled, backend
        positions = torch.as_tensor(first_position, device=device)
        self.batch = _batch_of(cache)
        self.positions = positions.long().expand(self.batch)[:, None].clone()
        self.tokens = torch.zeros(self.batch, 1, dtype=torch.long, device=device)
        self._left = cache.get_max_length() - int(cache.get_seq_length())
        ours = all(isinstance(layer, StaticPlanLayer) for layer in cache.layers)
        if not ours and model.config._attn_implementation == NAME:
            raise UnsupportedModelError(
                "every layer must keep its keys as the plan says for a decoding step, but some have a cache of the model's own (a sliding "
                "window), or the plan is dense everywhere. Use generate(), or run the model without the plan."
            )
        # a ready mask is handed through as it is: what a row sees is known to the cache
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.int32, device=device) if ours else None
        for layer in layers:  # rows differ from layer to layer, and one graph is to serve all
            for rows in (layer.keys, layer.values) if ours else ():
                torch._dynamo.maybe_mark_dynamic(rows, 0)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: tuple[int, ...] = ()
        self._logits: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Logits after one more token per row; the returned tensor is overwritten by the next call.

        Raises:
            SpecError: the cache is full.
        """
        if self._left < 1:
            raise SpecError(
                f"the cache holds at most {self.cache.get_max_length()} tokens per row and is full. Make a longer one."
            )
        self._left -= 1
        self.tokens.copy_(tokens.view(-1, 1))
        if not self.graph_wanted:
            self._logits = self._run()
            return self._logits
        if self._graph is None or self._addresses != _addresses(self.cache):
            self._capture()
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        return self._logits

    def generate(self, first: Int[Tensor, " B"], count: int) -> Int[Tensor, "B count"]:
        """Greedy decoding: `first`, and what follows it, `count` tokens in all."""
        tokens = [first.view(-1)]
        for _ in range(count - 1):
            tokens.append(self(tokens[-1]).argmax(-1))
        return torch.stack(tokens, 1)

    def _run(self) -> Float[Tensor, "B V"]:
        inputs = {"input_ids": self.tokens, "position_ids": self.positions, "attention_mask": self._mask}
        with _layers_compiled(self.model, self.cache, self.backend) if self.compiled else nullcontext():
            logits: Tensor = self.model(**inputs, use_cache=True, **{CACHE_KEYWORD: self.cache}).logits[:, -1]
        self.positions.add_(1)
        return logits

    def _capture(self) -> None:
        """Run the step a few times, take the runs back, and record it."""
        kept = _Kept(self.cache, self.positions)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run()
                kept.restore()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run()
        self._addresses = _addresses(self.cache)


class _Kept:
    """What one step changes in a cache, so that it can be taken back."""

    def __init__(self, cache: Cache, positions: Tensor) -> None:
        counters = [positions]
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []
        layers: list[Any] = cache.layers
        for layer in layers:
            if isinstance(layer, StaticPlanLayer):
                counters += [layer.seen, layer.slots, layer.reads.lens, layer.reads.sums]
                index = layer.next_rows()
                self.rows += [(rows, index, rows[index]) for rows in (layer.keys, layer.values)]
            else:
                counters.append(layer.cumulative_length)  # what lies behind it is never read
        self.counters = [(tensor, tensor.clone()) for tensor in counters]

    def restore(self) -> None:
        """Take the step back."""
        for tensor, before in self.counters:
            tensor.copy_(before)
        for rows, index, before in self.rows:
            rows[index] = before


def _batch_of(cache: Cache) -> int:
    layer: Any = cache.layers[0]
    return layer.reads.batch if isinstance(layer, StaticPlanLayer) else int(layer.keys.shape[0])


def _addresses(cache: Cache) -> tuple[int, ...]:
    """Where the tensors lie that a captured step reads; a longer prompt may have moved them."""
    found: list[int] = []
    layers: list[Any] = cache.layers
    for layer in layers:
        found += [layer.keys.data_ptr(), layer.values.data_ptr()]
        if isinstance(layer, StaticPlanLayer):
            found += [layer.seen.data_ptr(), *layer.reads.addresses()]
    return tuple(found)


@contextmanager
def _layers_compiled(model: PreTrainedModel, cache: Cache, backend: str) -> Iterator[None]:
    """Send each decoder layer through one compiled function, with its own cache in the place of the whole."""
    layers, config = decoder_layers(model), torch._dynamo.config
    run = _compiled(backend)
    try:
        for layer in layers:
            own: Any = layer.self_attn
            layer.forward = functools.partial(_through, run, layer, LayerCache(cache.layers[own.layer_idx]))
        # the index of a layer stays a number that nobody reads, instead of one graph for each
        with config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=64):
            yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _through(run: Any, layer: nn.Module, own: LayerCache, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return run(layer, hidden, *args, **{**kwargs, CACHE_KEYWORD: own})


@functools.cache
def _compiled(backend: str) -> Any:
    return torch.compile(_run_layer, backend=backend, fullgraph=True)


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
