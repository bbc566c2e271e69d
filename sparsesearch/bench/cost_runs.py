"""What a cost model is judged by, measured: held-out layers, and whole models with random weights."""

from collections.abc import Iterator, Sequence
from typing import Any

from sparsesearch.bench.cost_plans import HeldOutPlan
from sparsesearch.cost.device.runs import Bench, Row, time_schedule
from sparsesearch.model_shapes import ModelShape

DENSE_SEED = -1


def plan_runs(bench: Bench, plans: Sequence[HeldOutPlan]) -> Iterator[Row]:
    """One layer's attention under each plan."""
    for plan in plans:
        schedule = plan.schedule(bench.workers, bench.kernel)
        timed = time_schedule(bench, schedule, plan.length, plan.head_dim, plan.num_heads, plan.num_kv_heads)
        yield bench.row("plan", timed, **plan.to_dict())


def model_runs(
    bench: Bench,
    shape: ModelShape,
    prefills: Sequence[tuple[int, int]],
    decodes: Sequence[tuple[int, int]],
) -> Iterator[Row]:
    """Prefill and decoding of a whole model.

    Args:
        bench: the device.
        shape: the model.
        prefills: (prompt tokens, seed); four held-out layers from that seed on take turns over the model's layers; `DENSE_SEED` is dense.
        decodes: (batch, cached keys per sequence).
    """
    from sparsesearch.bench.llama_runs import RandomLlama

    model = RandomLlama(shape, bench)
    for batch, kv_tokens in decodes:
        timed = model.decode(batch, kv_tokens)
        yield bench.row("decode_step", timed, model=shape.name, batch=batch, kv_tokens=kv_tokens)
    for length, seed in prefills:
        schedules = [plan.schedule(bench.workers, bench.kernel) for plan in model_plans(shape, length, seed)]
        timed = model.prefill(length, schedules)
        yield bench.row("prefill", timed, model=shape.name, length=length, seed=seed)


def model_plans(shape: ModelShape, length: int, seed: int) -> tuple[HeldOutPlan, ...]:
    """The layers that take turns."""
    fixed: dict[str, Any] = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
    seeds = (seed,) if seed == DENSE_SEED else range(100 + seed, 104 + seed)
    return tuple(HeldOutPlan(length, shape.head_dim, each, **fixed) for each in seeds)
