"""Small models of whole layers, timed: what the parts leave out when they run together."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from sparsesearch.cost.device.fused_chain import FusedChain
from sparsesearch.cost.device.llama import RandomLlama
from sparsesearch.cost.device.micro_bench import Bench, Row
from sparsesearch.cost.device.run_plan import EVICTING, PROBE, PROBE_KV_TOKENS, SHORT, SHORT_KV_TOKENS
from sparsesearch.cost.device.tile_cases import TileCase
from sparsesearch.model_shapes import ModelShape

VOCABULARY = 131072
MEMORY_SHARE = 0.25
"""Of the device, for the largest probe's weights and caches."""


def layer_runs(bench: Bench, batches: Sequence[int], fused: Sequence[int], tokens: Sequence[int]) -> Iterator[Row]:
    """Decoding steps at each batch, plain and fused, and dense prefills of each length."""
    if not batches and not tokens:
        return
    bench.settle()
    for probe in (fitting(EVICTING, bench.memory_bytes, max(batches, default=1)), replace(EVICTING, num_layers=1)):
        yield from _decode_steps(bench, RandomLlama(probe, bench), batches)
        chain = FusedChain(probe, bench)
        yield from _fused_steps(bench, chain, fused, PROBE_KV_TOKENS)
        if probe.num_layers == 1:  # beside more layers their noise would be as large
            yield from _turns(bench, chain, fused)
    yield from _fused_steps(bench, FusedChain(SHORT, bench), fused, SHORT_KV_TOKENS)
    model = RandomLlama(PROBE, bench)
    yield from _decode_steps(bench, model, batches)
    for length in tokens:
        case = TileCase("dense", length, PROBE.head_dim, num_heads=PROBE.num_heads, num_kv_heads=PROBE.num_kv_heads)
        timed = model.prefill(length, [case.schedule(bench.workers, bench.kernel)])
        yield bench.row("layer_prefill", timed, tokens=length)


def fitting(shape: ModelShape, memory_bytes: float, batch: int) -> ModelShape:
    """As many of its layers as `MEMORY_SHARE` holds with the caches of `batch` sequences; at least two."""
    cached = 2 * batch * PROBE_KV_TOKENS * shape.num_kv_heads * shape.head_dim
    layer_bytes = 2 * (shape.layer_matmul_parameters + cached)
    return replace(shape, num_layers=max(2, min(shape.num_layers, int(MEMORY_SHARE * memory_bytes // layer_bytes))))


def _decode_steps(bench: Bench, model: RandomLlama, batches: Sequence[int]) -> Iterator[Row]:
    for batch in batches:
        timed = model.decode(batch, PROBE_KV_TOKENS)
        yield bench.row("layer_decode", timed, batch=batch, probe=model.shape.name, layers=model.shape.num_layers)


def _turns(bench: Bench, chain: FusedChain, batches: Sequence[int]) -> Iterator[Row]:
    """Steps one after the other, as `generate` runs them: replay, choose the tokens, hand them on."""
    for batch in batches:
        logits, tokens = bench.normal(batch, VOCABULARY), torch.zeros(batch, dtype=torch.long, device=bench.device)
        with torch.inference_mode():
            step = chain.replayed(batch, PROBE_KV_TOKENS)

            def turn(_: int) -> object:
                step()  # noqa: B023
                return tokens.copy_(logits.argmax(-1))  # noqa: B023

            timed = bench.time(turn, warm_s=0.05, graph=False)
        yield bench.row("turn", timed, batch=batch, probe=chain.shape.name, layers=chain.shape.num_layers)


def _fused_steps(bench: Bench, chain: FusedChain, batches: Sequence[int], kv_tokens: int) -> Iterator[Row]:
    shape = chain.shape
    for batch in batches:
        with torch.inference_mode():
            timed = chain.step(batch, kv_tokens)
        yield bench.row(
            "layer_fused", timed, batch=batch, probe=shape.name, layers=shape.num_layers, kv_tokens=kv_tokens
        )
