"""The micro-runs of a calibration: peaks, tiles, dense attention, decoding, linear layers, fused products, pointwise layers, estimators, permutation.

Each returns rows of plain numbers; `fit` turns them into a cost model. A row names its group, its parameters and its seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.device.layer_probes import layer_runs
from sparsesearch.cost.device.micro_bench import Bench, Row
from sparsesearch.cost.device.run_plan import HAVE_KERNELS, MANY_HEADS, RunPlan, SkinnyUse, estimators
from sparsesearch.cost.device.step_runs import step_runs
from sparsesearch.cost.device.tile_cases import TileCase, on_device, tile_cases
from sparsesearch.cost.device.timing import Timed
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.kernels.device_schedule import build_on_device
from sparsesearch.kernels.device_select import Selector
from sparsesearch.kernels.dispatch import run_schedule, tile_shape
from sparsesearch.kernels.row_copies import take_rows
from sparsesearch.kernels.schedule import Span
from sparsesearch.kernels.step_ops import skinny_linear
from sparsesearch.rules import Rule

SLOW_S = 0.05
WARM_S = 0.3
FEW_KV_HEADS = 2


def all_runs(bench: Bench, plan: RunPlan) -> Iterator[Row]:
    """Every group in turn, on a device that compiling has not let cool."""
    bench.settle(WARM_S)
    yield from peak_runs(bench, plan.peak_side)
    for head_dim, block_tokens in plan.tile_kinds:
        cases = [case for case in tile_cases(head_dim, block_tokens) if case.length <= plan.longest_tokens]
        yield from tile_runs(bench, cases)
    yield from dense_runs(bench, plan.dense_tokens, plan.decode_head_dims)
    yield from decode_runs(bench, plan.decode, plan.decode_head_dims)
    few = [(1, tokens) for tokens in plan.decode_few]
    yield from decode_runs(bench, few, plan.decode_head_dims, kv_heads=FEW_KV_HEADS)
    yield from step_runs(bench, plan)
    yield from gemm_runs(bench, plan.gemm_tokens, plan.gemm_widths)
    for row in gemm_runs(bench, plan.layer_batches, plan.probe_widths):
        yield row | {"group": "probe_gemm"}
    yield from skinny_runs(bench, plan.skinny_rows, plan.skinny)
    yield from pointwise_runs(bench, plan.pointwise_tokens)
    yield from layer_runs(bench, plan.layer_batches, plan.fused_batches, plan.layer_tokens)
    yield from permutation_runs(bench, plan.estimator_tokens)
    yield from choosing_runs(bench, plan.estimator_tokens, tuple(estimators()))


def peak_runs(bench: Bench, side: int) -> Iterator[Row]:
    """Matrix product, copy (bytes read and written), and read (a sum)."""
    a, b = bench.normal(side, side), bench.normal(side, side)
    out = torch.empty_like(a)
    yield bench.row(
        "peak", bench.time(lambda _: torch.matmul(a, b, out=out)), name="matmul_flop_per_s", amount=2.0 * side**3
    )
    source = bench.normal(8 * side, side)
    target = torch.empty_like(source)
    copied = bench.time(lambda _: target.copy_(source), graph=False)
    yield bench.row("peak", copied, name="copy_bytes_per_s", amount=2.0 * source.nbytes)
    yield bench.row("peak", bench.time(lambda _: source.sum()), name="read_bytes_per_s", amount=float(source.nbytes))
    one = bench.normal(64)
    yield bench.row("peak", bench.time(lambda _: one.add_(1)), name="launch_per_s", amount=1.0)


def tile_runs(bench: Bench, cases: Sequence[TileCase]) -> Iterator[Row]:
    """Prefill attention over tile schedules."""
    for case in cases:
        schedule = case.schedule(bench.workers, bench.kernel)
        timed = time_schedule(bench, schedule, case.length, case.head_dim, case.num_heads, case.num_kv_heads)
        yield bench.row("tiles", timed, **case.to_dict())


def time_schedule(bench: Bench, schedule: Any, length: int, head_dim: int, num_heads: int, num_kv_heads: int) -> Timed:
    """Time one layer's attention over a schedule; the queries, keys and values take turns."""
    placed = on_device(schedule, bench.device)
    width = (num_heads + 2 * num_kv_heads) * length * head_dim
    copies = bench.copies(2.0 * width, most=4)
    inputs = [
        tuple(bench.normal(1, heads, length, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads))
        for _ in range(copies)
    ]

    def run(copy: int) -> object:
        q, k, v = inputs[copy]
        return run_schedule(q, k, v, placed, scale=head_dim**-0.5, kernel=bench.kernel)

    return bench.time(run, copies=copies)


def dense_runs(
    bench: Bench, tokens: Sequence[int], head_dims: Sequence[int], heads: int = 32, kv_heads: int = 8
) -> Iterator[Row]:
    """Causal attention as a model without a plan runs it, by the kernel that PyTorch picks."""
    for head_dim in head_dims:
        for length in tokens:
            copies = bench.copies(2.0 * (heads + 2 * kv_heads) * length * head_dim, most=4)
            inputs = [
                # queries as a projection leaves them, keys and values as they lie in a cache
                [
                    bench.normal(1, length, heads, head_dim).transpose(1, 2),
                    *(bench.normal(1, kv_heads, length, head_dim) for _ in "kv"),
                ]
                for _ in range(copies)
            ]

            def run(copy: int) -> object:
                q, k, v = inputs[copy]  # noqa: B023
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            timed = bench.time(run, copies=copies)
            pairs = heads * length * (length + 1) / 2
            yield bench.row("dense", timed, head_dim=head_dim, tokens=length, pairs=pairs)


def decode_runs(
    bench: Bench, shapes: Sequence[tuple[int, int]], head_dims: Sequence[int], *, kv_heads: int = 8
) -> Iterator[Row]:
    """One query per head against its cache; four query heads share it."""
    for head_dim in head_dims:
        for batch, tokens in shapes:
            pairs = batch * kv_heads
            copies = bench.copies(4.0 * pairs * tokens * head_dim)
            caches = [[bench.normal(pairs * tokens, head_dim) for _ in "kv"] for _ in range(copies)]
            q = bench.normal(batch, 4 * kv_heads, head_dim)
            starts = torch.arange(pairs, device=bench.device) * tokens
            lens = torch.full((pairs,), tokens, device=bench.device, dtype=torch.int32)

            def run(copy: int) -> object:
                k, v = caches[copy]  # noqa: B023
                return ragged_decode(q, k, v, starts, lens, scale=q.shape[-1] ** -0.5)  # noqa: B023

            timed = bench.time(run, copies=copies, warm_s=0.02)
            heads = {"num_kv_heads": kv_heads, "num_heads": 4 * kv_heads}
            yield bench.row("decode", timed, head_dim=head_dim, batch=batch, tokens=tokens, **heads)


def gemm_runs(bench: Bench, tokens: Sequence[int], widths: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """Linear layers: [m, k] x [n, k] transposed."""
    for n, k in widths:
        copies = bench.copies(2.0 * n * k)
        weights = [bench.normal(n, k) for _ in range(copies)]
        for m in tokens:
            if m * n > 1 << 31:
                continue
            x = bench.normal(m, k)
            timed = bench.time(lambda copy: F.linear(x, weights[copy]), copies=copies, warm_s=0.02 if m < 512 else 0.1)  # noqa: B023
            yield bench.row("gemm", timed, m=m, n=n, k=k)


def skinny_runs(bench: Bench, rows: Sequence[int], products: Sequence[tuple[int, int, SkinnyUse]]) -> Iterator[Row]:
    """Products of the fused step, one after the other, as the step launches them: each starts while the one before still runs."""
    for n, k, use in products:
        copies = bench.copies(2.0 * n * k)
        weights = [bench.normal(n, k) for _ in range(copies)]
        for m in rows:
            timed = bench.time(skinny_product(bench, weights, m, use), copies=copies, warm_s=0.02)
            yield bench.row("skinny", timed, m=m, n=n, k=k, use=use)


def skinny_product(bench: Bench, weights: Sequence[Tensor], rows: int, use: SkinnyUse) -> Callable[[int], object]:
    """A product of `rows` rows with the weights of the given number, and what its use adds."""
    lines, inner = weights[0].shape
    x, squares = bench.normal(rows, inner), torch.ones(rows, 1, device=bench.device)
    outer, gain = bench.normal(rows, lines), bench.normal(lines)
    if use == "added":
        return lambda copy: skinny_linear(x, weights[copy], None, outer, None, gain, 0.0, False)
    return lambda copy: skinny_linear(x, weights[copy], None, None, squares, None, 1e-5, use == "gated")


def pointwise_runs(bench: Bench, tokens: Sequence[int], width: int = 4096) -> Iterator[Row]:
    """Norm, rotation, gate and residual as transformers' Llama computes them, over their elements."""
    from transformers.activations import ACT2FN
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    norm = LlamaRMSNorm(width).to(bench.device, bench.dtype)
    silu = ACT2FN["silu"]
    for count in tokens:
        copies = bench.copies(2.0 * count * width, most=3)
        x = [bench.normal(1, count, width) for _ in range(copies)]
        y = bench.normal(1, count, width)
        cos, sin = bench.normal(1, count, 128), bench.normal(1, count, 128)

        def heads(z: Tensor) -> Tensor:
            return z.view(1, z.shape[1], -1, 128).transpose(1, 2)

        works: dict[str, Callable[[int], object]] = {
            "norm": lambda copy: norm(x[copy]),  # noqa: B023
            "rotation": lambda copy: apply_rotary_pos_emb(heads(x[copy]), heads(y)[:, :0], cos, sin),  # noqa: B023
            "gate": lambda copy: silu(x[copy]) * y,  # noqa: B023
            "residual": lambda copy: x[copy] + y,  # noqa: B023
            "transpose": lambda copy: heads(x[copy]).clone(memory_format=torch.contiguous_format),  # noqa: B023
        }
        with torch.inference_mode():
            for name, run in works.items():
                timed = bench.time(run, copies=copies, warm_s=0.02)
                yield bench.row("pointwise", timed, name=name, elements=count * width)


def choosing_runs(bench: Bench, tokens: Sequence[int], kinds: Sequence[str]) -> Iterator[Row]:
    """Dynamic rules of these kinds: each for few heads, and those with kernels for many at the two shortest lengths too."""
    yield from estimator_runs(bench, tokens, kinds)
    several = tuple(kind for kind in kinds if kind in HAVE_KERNELS)
    if several:
        yield from estimator_runs(bench, tokens[:2], several, heads=MANY_HEADS)


def estimator_runs(
    bench: Bench, tokens: Sequence[int], kinds: Sequence[str] = (), heads: int = 8, head_dim: int = 128
) -> Iterator[Row]:
    """What a dynamic rule takes before attention can start: its choice as the runtime makes it and, on a GPU, the schedule built from it.

    Of all rules, or of the named kinds. A rule that cannot run here gives a row of group `skipped` with the reason; one that is slow is not tried at longer prompts.
    """
    for kind, rule in estimators().items():
        for length in tokens if not kinds or kind in kinds else ():
            q, k = bench.normal(heads, length, head_dim), bench.normal(heads, length, head_dim)
            try:
                choose = _choice(bench, rule, BlockGrid(length, length, 128), q, k)
                timed = bench.time(choose, warm_s=0.02, graph=kind in HAVE_KERNELS)
            except RuntimeError as error:
                yield {"group": "skipped", "name": kind, "tokens": length, "error": str(error)[:200]}
                break
            yield bench.row("estimator", timed, name=kind, tokens=length, heads=heads, head_dim=head_dim)
            if timed.seconds > SLOW_S:
                break


def _choice(bench: Bench, rule: Rule, grid: BlockGrid, q: Tensor, k: Tensor) -> Callable[[int], object]:
    if not q.is_cuda:
        return lambda _: rule.select(grid, q, k)
    selector = Selector((rule,) * len(q), grid, len(k), q.device)
    shape = tile_shape(bench.kernel, q.shape[-1], 128)

    def choose(_: int) -> object:
        tiles = selector.choose(q, k, scale=q.shape[-1] ** -0.5)
        return build_on_device((Span(grid),), [tiles], shape=shape, workers=bench.workers)

    return choose


def permutation_runs(bench: Bench, tokens: Sequence[int], heads: int = 32, head_dim: int = 128) -> Iterator[Row]:
    """All heads' tokens gathered in another order, as `kernels.ordered` does it; putting them back moves the same bytes."""
    for length in tokens:
        copies = bench.copies(2.0 * heads * length * head_dim)
        x = [bench.normal(1, heads, length, head_dim) for _ in range(copies)]
        every, order = torch.arange(heads, device=bench.device), torch.randperm(length, device=bench.device)
        timed = bench.time(lambda copy: take_rows(x[copy], every, order), copies=copies, warm_s=0.02)  # noqa: B023
        yield bench.row("permutation", timed, nbytes=float(x[0].nbytes))
