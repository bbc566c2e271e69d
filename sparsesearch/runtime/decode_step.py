"""One decoding step of a whole model, captured once and replayed: tokens in, logits out, and nothing asked of the host in between.

    cache = sparsesearch.sparse_cache(model, max_tokens=40_000)
    first = model(input_ids, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
    step = DecodeStep(model, cache, first_position=input_ids.shape[1])
    tokens = step.generate(first, 64)

How a step is computed, from the fastest on:

    fused      Llama-like decoders, bfloat16 (float32 if asked for), at most 16 rows, kernels for attention: `fused_step`. The first step is
               computed both ways, fused and by the model itself, and both must agree
    compiled   decoder layers through torch.compile: `compiled_layers`
    plain      the model as it is

"""

import logging
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sparsesearch.errors import SpecError, UnsupportedModelError
from sparsesearch.runtime.attention import NAME
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.compiled_layers import layers_compiled
from sparsesearch.runtime.fused_step import FusedStep
from sparsesearch.runtime.static_layer import StaticPlanLayer
from sparsesearch.runtime.static_reads import same_choices

_log = logging.getLogger(__name__)
_AGREEMENT = {torch.bfloat16: 2**-3, torch.float32: 2**-10}
"""Most that fused logits may differ from the model's own, root mean square over the logits' spread; another formula differs by about 1."""
_WARM_UPS = 2  # the first run compiles kernels, the second shows that nothing is left to compile


class DecodeStep:
    """A step of `model` on a static cache that holds its prompts.

    Args:
        model: a model that runs a plan (or none, with transformers' own static cache).
        cache: a static cache after its prefill.
        first_position: position of the next token, per row if rows differ: for left-padded prompts their real lengths.
        compiled: compile decoder layers with torch.compile (regional) where they are not fused; fewer and larger kernels, at the price of
            seconds once.
        fused: use the fused kernels. None: where they serve, on a GPU in bfloat16, and if not, `fallback_reason` says why.
        graph: capture the step into a CUDA graph; needs a GPU.
        backend: of torch.compile.

    Attributes:
        fallback_reason: why a step is not fused that might have been; None if it is, or was not to be.

    Raises:
        SpecError: the cache holds no prompt or is not static, or a graph is wanted on a CPU.
        UnsupportedModelError: `fused`, but the kernels do not serve this model; or `compiled`, but it has no plain list of decoder layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        *,
        first_position: int | Int[Tensor, " B"],
        compiled: bool = False,
        fused: bool | None = None,
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
        self.fallback_reason: str | None = None
        self._fused = self._fuse(fused)
        self._must_fuse, self._is_checked = bool(fused), self._fused is None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._changes: tuple[int, ...] = ()
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
        if not self._is_checked:
            self._check_fused()
        if not self.graph_wanted:
            self._logits = self._run()
            return self._logits
        if self._graph is None or self._has_moved():
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

    @property
    def is_fused(self) -> bool:
        """Whether the fused kernels compute it."""
        return self._fused is not None

    def _fuse(self, wanted: bool | None) -> FusedStep | None:
        if wanted is False or (
            wanted is None and (self.model.device.type, self.model.dtype) != ("cuda", torch.bfloat16)
        ):
            return None
        try:
            return FusedStep(self.model, self.cache, self.batch, backend=self.backend if self.compiled else None)
        except UnsupportedModelError as error:
            if wanted:
                raise
            self._fall_back(str(error))
            return None

    def _fall_back(self, reason: str) -> None:
        self._fused, self.fallback_reason = None, reason
        _log.info("the decoding step is not fused: %s", reason)

    def _check_fused(self) -> None:
        """Compute one step both ways, and take both back.

        Raises:
            UnsupportedModelError: the model computes something else than its parts show, and the fused step was asked for.
        """
        assert self._fused is not None
        kept = _Kept(self.cache, self.positions)
        layers: list[Any] = self.cache.layers
        with same_choices([layer.reads for layer in layers if isinstance(layer, StaticPlanLayer)]):
            plain = self._by_model(compiled=False).float()
            kept.restore()
            ours = self._fused(self.tokens, self.positions).float()
            kept.restore()
        self._is_checked = True
        distance = float((ours - plain).square().mean().sqrt() / plain.std().clamp(min=1e-30))
        if distance <= _AGREEMENT[self.model.dtype]:
            return
        reason = (
            f"the fused step must compute what {type(self.model).__name__} computes, but its first logits differ by {distance:.2g} of their "
            "spread. Pass fused=False."
        )
        if self._must_fuse:
            raise UnsupportedModelError(reason)
        self._fall_back(reason)

    def _run(self) -> Float[Tensor, "B V"]:
        logits = self._by_model(self.compiled) if self._fused is None else self._fused(self.tokens, self.positions)
        self.positions.add_(1)
        return logits

    def _by_model(self, compiled: bool) -> Float[Tensor, "B V"]:
        inputs = {"input_ids": self.tokens, "position_ids": self.positions, "attention_mask": self._mask}
        with layers_compiled(self.model, self.cache, self.backend) if compiled else nullcontext():
            logits: Tensor = self.model(**inputs, use_cache=True, **{CACHE_KEYWORD: self.cache}).logits[:, -1]
        return logits

    def _has_moved(self) -> bool:
        """Whether a tensor lies elsewhere than when the step was captured; hundreds are asked only if something else than steps has run."""
        changes = _changes(self.cache)
        if changes == self._changes:
            return False
        self._changes = changes
        return self._addresses != _addresses(self.cache)

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
        self._changes, self._addresses = _changes(self.cache), _addresses(self.cache)


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
                index = layer.reads.next_bounds(layer.seen)
                bounds = (x.flatten(0, 2) for x in (layer.reads.low, layer.reads.high))
                self.rows += [(rows, index, rows[index]) for rows in bounds]
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


def _changes(cache: Cache) -> tuple[int, ...]:
    """When each layer's tensors may last have been moved; a layer of transformers' own does not count, but has two tensors only."""
    layers: list[Any] = cache.layers
    return tuple(
        layer.last_change
        if isinstance(layer, StaticPlanLayer)
        else hash((layer.keys.data_ptr(), layer.values.data_ptr()))
        for layer in layers
    )


def _addresses(cache: Cache) -> tuple[int, ...]:
    """Where the tensors lie that a captured step reads; a longer prompt may have moved them."""
    found: list[int] = []
    layers: list[Any] = cache.layers
    for layer in layers:
        found += [layer.keys.data_ptr(), layer.values.data_ptr()]
        if isinstance(layer, StaticPlanLayer):
            found += [layer.seen.data_ptr(), *layer.reads.addresses()]
    return tuple(found)
