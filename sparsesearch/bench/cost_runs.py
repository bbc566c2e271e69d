"""What a cost model is judged by, measured: held-out layers, and whole models with random weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsesearch.bench.cost_plans import HeldOutPlan
from sparsesearch.bench.meter import allocated_bytes, emptied, peak_bytes
from sparsesearch.bench.model_session import cache_bytes
from sparsesearch.bench.random_model import mixture_plan, random_model
from sparsesearch.cost.device.llama import RandomLlama
from sparsesearch.cost.device.micro_bench import Bench, Row
from sparsesearch.cost.device.runs import time_schedule
from sparsesearch.cost.device.timing import event_times, timed_of
from sparsesearch.model_shapes import ModelShape
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.decode_step import DecodeStep
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.live import apply
from sparsesearch.runtime.prepare import sparse_cache

DENSE_SEED = -1
STEPS = 32
"""Fused steps that are timed; half as many run before."""


@dataclass
class _Peak:
    """Most bytes allocated meanwhile, less what lay there beside the weights."""

    nbytes: int = 0


@contextmanager
def _peak_above(model: nn.Module) -> Iterator[_Peak]:
    found, device = _Peak(), next(model.parameters()).device
    emptied(device)
    other = allocated_bytes(device) - sum(weight.nbytes for weight in model.parameters())
    yield found
    found.nbytes = peak_bytes(device) - other


def plan_runs(bench: Bench, plans: Sequence[HeldOutPlan]) -> Iterator[Row]:
    """One layer's attention under each plan."""
    for plan in plans:
        schedule = plan.schedule(bench.workers, bench.kernel)
        timed = time_schedule(bench, schedule, plan.length, plan.head_dim, plan.num_heads, plan.num_kv_heads)
        yield bench.row("plan", timed, **plan.to_dict())


def decode_runs(model: RandomLlama, decodes: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """Steps of the model as transformers computes them; `decodes` are (batch, cached keys per sequence)."""
    for batch, kv_tokens in decodes:
        timed = model.decode(batch, kv_tokens)
        yield model.bench.row("decode_step", timed, model=model.shape.name, batch=batch, kv_tokens=kv_tokens)


def prefill_runs(model: RandomLlama, prefills: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """Prompts; `prefills` are (tokens, seed): four held-out layers from that seed on take turns over the model's; `DENSE_SEED` is dense."""
    bench = model.bench
    for length, seed in prefills:
        schedules = [plan.schedule(bench.workers, bench.kernel) for plan in model_plans(model.shape, length, seed)]
        with _peak_above(model.model) as peak:
            timed = model.prefill(length, schedules)
        yield bench.row("prefill", timed, model=model.shape.name, length=length, seed=seed, peak_bytes=peak.nbytes)


def fused_runs(bench: Bench, shape: ModelShape, decodes: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """Fused steps of a model under a plan that keeps a quarter of the cache, through the runtime; (batch, prompt tokens).

    A row's `kv_tokens` are the keys that each KV head of each layer reads per sequence; `peak_bytes` and `cache_bytes` are those of the prompt.
    """
    model = random_model(shape, device=bench.device, dtype=bench.dtype, max_tokens=max(tokens for _, tokens in decodes))
    plan = mixture_plan(describe(model, shape.name), density=0.3, kv_fraction=0.25)
    with torch.no_grad(), apply(model, plan, backend=bench.kernel, allow_other_weights=True):
        for batch, tokens in decodes:
            cache: Any = sparse_cache(model, max_tokens=tokens + 2 * STEPS)
            ids = torch.randint(shape.vocab_size, (1, tokens), device=bench.device)
            with _peak_above(model) as peak:
                model(ids, use_cache=True, logits_to_keep=1, **{CACHE_KEYWORD: cache})
            memory = {"peak_bytes": peak.nbytes, "cache_bytes": cache_bytes(cache)}
            cache.batch_repeat_interleave(batch)
            step = DecodeStep(model, cache, first_position=tokens, fused=True)
            newest = torch.zeros(batch, dtype=torch.long, device=bench.device)
            for _ in range(STEPS // 2):
                step(newest)
            samples = event_times(partial(step, newest), STEPS)
            lens = [layer.reads.lens.view(batch, -1).float().mean(0).tolist() for layer in cache.layers]
            row = {"model": shape.name, "batch": batch, "prompt_tokens": tokens, "kv_tokens": lens}
            yield bench.row("fused_step", timed_of(samples), **row, **memory)


def model_plans(shape: ModelShape, length: int, seed: int) -> tuple[HeldOutPlan, ...]:
    """The layers that take turns."""
    fixed: dict[str, Any] = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
    seeds = (seed,) if seed == DENSE_SEED else range(100 + seed, 104 + seed)
    return tuple(HeldOutPlan(length, shape.head_dim, each, **fixed) for each in seeds)
