"""Layers of a fused decoding step with random weights and full caches: the launches of `runtime.fused_step`, without a model around them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsesearch.cost.device.micro_bench import Bench
from sparsesearch.cost.device.timing import Timed, repeated
from sparsesearch.cost.layer_parts import fused_widths
from sparsesearch.kernels.cache_ops import KEEP_ALL
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.kernels.step_ops import rotate_append, scale_rows, skinny_linear
from sparsesearch.model_shapes import ModelShape

BLOCK_TOKENS = 128
EPS = 1e-5


@dataclass(frozen=True)
class _Caches:
    """Of all layers, and where each pair's rows lie."""

    layers: list[tuple[Tensor, Tensor]]
    start: Tensor
    lens: Tensor
    limits: tuple[Tensor, ...]
    counters: tuple[Tensor, ...]


class FusedChain:
    """The layers of a shape.

    Args:
        shape: as many layers as it has; its vocabulary is left out.
        bench: the device.
    """

    def __init__(self, shape: ModelShape, bench: Bench) -> None:
        self.shape, self.bench = shape, bench
        self.gain = bench.normal(shape.hidden_size)
        self.weights = [[bench.normal(*width) for width in fused_widths(shape)] for _ in range(shape.num_layers)]

    def step(self, batch: int, kv_tokens: int) -> Timed:
        """Time of one step of all layers; every pair reads `kv_tokens` keys."""
        return self.bench.time(self._step(batch, kv_tokens), warm_s=0.1)

    def replayed(self, batch: int, kv_tokens: int) -> Callable[[], object]:
        """One step, ready to be run: on a GPU, as a graph."""
        run, on_gpu = self._step(batch, kv_tokens), torch.device(self.bench.device).type == "cuda"
        run(0)
        return repeated(run, 1, graph=on_gpu)

    def _step(self, batch: int, kv_tokens: int) -> Callable[[int], object]:
        bench, shape = self.bench, self.shape
        caches = self._caches(batch, kv_tokens)
        hidden = bench.normal(batch, shape.hidden_size)
        angles = [bench.normal(batch, shape.head_dim) for _ in range(2)]
        return lambda _: self._run(hidden, angles, caches)

    def _caches(self, batch: int, kv_tokens: int) -> _Caches:
        bench, pairs = self.bench, batch * self.shape.num_kv_heads
        rows = (pairs * kv_tokens, self.shape.head_dim)
        layers = [(bench.normal(*rows), bench.normal(*rows)) for _ in range(self.shape.num_layers)]

        def each(value: int) -> Tensor:
            return torch.full((pairs,), value, dtype=torch.int32, device=bench.device)

        slots = torch.full((), kv_tokens, dtype=torch.int64, device=bench.device)
        # the cache is full: what a pair reads stays the same from step to step
        return _Caches(
            layers,
            start=torch.arange(pairs, device=bench.device) * kv_tokens,
            lens=each(kv_tokens),
            limits=(each(kv_tokens), each(0), each(KEEP_ALL)),
            counters=(each(kv_tokens), slots),
        )

    def _run(self, hidden: Tensor, angles: list[Tensor], caches: _Caches) -> Tensor:
        shape, (seen, slots) = self.shape, caches.counters
        scaled, squares = scale_rows(hidden, self.gain)
        for (qkv, output, gate_up, down), (keys, values) in zip(self.weights, caches.layers, strict=True):
            new = skinny_linear(scaled, qkv, None, None, squares, None, EPS, False)[0]
            q = rotate_append(
                new, *angles, None, None, EPS, shape.num_heads, keys, values, caches.start, *caches.limits, seen, caches.lens, slots,
                BLOCK_TOKENS,
            )  # fmt: skip
            attended = ragged_decode(q, keys, values, caches.start, caches.lens, scale=shape.head_dim**-0.5)[0]
            hidden, scaled, squares = skinny_linear(
                attended.view(len(new), -1), output, None, hidden, None, self.gain, EPS, False
            )
            inner = skinny_linear(scaled, gate_up, None, None, squares, None, EPS, True)[0]
            hidden, scaled, squares = skinny_linear(inner, down, None, hidden, None, self.gain, EPS, False)
        return hidden
