"""Compile what a calibration will time, all at once: most of a compiler's time is spent outside Python's lock.

Compiling one kernel after the other, as the cases come, took more than half of a calibration. Many cases share kernels, and Triton lets
every thread that finds one missing compile it, so threads take turns (`Turns`).
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch

from sparsesearch.cost.device import runs, step_runs
from sparsesearch.cost.device.fused_chain import FusedChain
from sparsesearch.cost.device.micro_bench import Bench, CompilingBench
from sparsesearch.cost.device.run_plan import EVICTING, HAVE_KERNELS, MANY_HEADS, SHORT, RunPlan, estimators, step_rules
from sparsesearch.cost.device.tile_cases import tile_cases
from sparsesearch.model_shapes import ModelShape

Job = Callable[[], object]
FEW_TOKENS = 256


def compile_ahead(bench: Bench, plan: RunPlan) -> None:
    """Run one case of every kernel that the plan's runs will launch, on as many threads as there are cores."""
    run_all(bench.device, jobs(CompilingBench(bench), plan))


def run_all(device: str, todo: Iterable[Job]) -> None:
    """Run jobs on as many threads as there are cores, and give the memory back."""
    waiting = 4  # threads per core: of ten that need one kernel, nine wait for it
    with Turns() as turns, ThreadPoolExecutor(waiting * (os.cpu_count() or 1)) as threads:
        for done in [threads.submit(_tried, job, turns) for job in todo]:
            done.result()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _tried(job: Job, turns: "Turns") -> None:
    try:
        # what fails here fails again, and is reported, where it is timed
        with suppress(Exception), torch.inference_mode():
            job()
    finally:
        turns.give_up()


class Turns:
    """While it is entered, a kernel that several threads miss is compiled by the first; the others wait, and read it from Triton's cache."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: dict[tuple[str, str, str], threading.Event] = {}
        self._mine = threading.local()

    def __enter__(self) -> Self:
        from triton import knobs

        self._before = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = self._begin, self._end
        return self

    def __exit__(self, *exception: object) -> None:
        from triton import knobs

        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = self._before

    def give_up(self) -> None:
        """What the calling thread has begun is over, whether or not it could be compiled."""
        for done in getattr(self._mine, "begun", ()):
            done.set()
        self._mine.begun = []

    def _begin(self, *, key: str, fn: Any, **_: Any) -> bool:
        with self._lock:
            first = (name := (fn.module, fn.name, str(key))) not in self._done
            done = self._done.setdefault(name, threading.Event())
        if first:
            self._mine.begun = [*getattr(self._mine, "begun", ()), done]
        else:
            done.wait()
        return False  # go on: compile it, or find it in the cache

    def _end(self, *, key: str, fn: Any, **_: Any) -> bool:
        self._done[fn.module, fn.name, str(key)].set()
        return False


def jobs(bench: CompilingBench, plan: RunPlan) -> Iterator[Job]:
    """The longest ones first."""
    for head_dim, block_tokens in plan.tile_kinds:
        cases = [case for case in tile_cases(head_dim, block_tokens) if case.length <= plan.longest_tokens]
        # the shortest of each family, then the longest: some kernels serve long prompts only
        for order in (cases[::-1], cases):
            yield partial(list, runs.tile_runs(bench, list({case.family: case for case in order}.values())))
    yield from choices(bench, plan.estimator_tokens, tuple(estimators()))
    batches = {(head_dim, batch) for head_dim in plan.decode_head_dims for batch, _ in plan.decode}
    probed = {(EVICTING.head_dim, batch) for batch in plan.layer_batches}
    for head_dim, batch in sorted(batches | probed):
        yield partial(list, runs.decode_runs(bench, ((batch, FEW_TOKENS),), (head_dim,)))
    for head_dim in plan.decode_head_dims if plan.decode_few else ():
        yield partial(list, runs.decode_runs(bench, ((1, FEW_TOKENS),), (head_dim,), kv_heads=runs.FEW_KV_HEADS))
    yield from steps(bench, plan)
    for product in plan.skinny:
        for rows in plan.skinny_rows:
            yield partial(list, runs.skinny_runs(bench, (rows,), (product,)))
    for shape in (EVICTING, SHORT):
        for batch in plan.fused_batches:
            yield partial(_two_layers, bench, shape, batch)
    yield partial(list, runs.permutation_runs(bench, (FEW_TOKENS,)))


def choices(bench: CompilingBench, tokens: Sequence[int], kinds: Sequence[str]) -> Iterator[Job]:
    """Those of `runs.choosing_runs`."""
    for kind in kinds:
        for length in tokens:
            yield partial(list, runs.estimator_runs(bench, (length,), (kind,)))
    for kind in set(kinds) & set(HAVE_KERNELS):
        for length in tokens[:2]:
            yield partial(list, runs.estimator_runs(bench, (length,), (kind,), heads=MANY_HEADS))


def steps(bench: CompilingBench, plan: RunPlan) -> Iterator[Job]:
    """Those of `step_runs.step_runs`."""
    for kind, rule in step_rules().items():
        for blocks in plan.step_blocks:
            yield partial(list, step_runs.choice_runs(bench, kind, rule, 1, (blocks,)))
    for head_dim in plan.decode_head_dims:
        for batch in plan.step_batches:
            yield partial(list, step_runs.page_runs(bench, head_dim, batch, plan.step_keys[:1]))
    for batch in plan.step_batches:
        yield partial(list, step_runs.joined_runs(bench, (batch,), plan.step_blocks[-2]))
    for held_out in plan.steps_held_out:
        yield partial(list, step_runs.held_out_runs(bench, (held_out,)))


def _two_layers(bench: Bench, shape: ModelShape, batch: int) -> None:
    """The second one's first product adds up squares of another product's parts."""
    FusedChain(replace(shape, num_layers=2), bench).step(batch, FEW_TOKENS)
