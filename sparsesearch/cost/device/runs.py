"""The micro-runs of a calibration: peaks, tiles, decoding, linear layers, pointwise layers, estimators, permutation.

Each returns rows of plain numbers; `fit` turns them into a cost model. A row names its group, its parameters and its seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.device.llama import RandomLlama
from sparsesearch.cost.device.tile_cases import TileCase, on_device, tile_cases
from sparsesearch.cost.device.timing import Timed, sustained
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.kernels.device_schedule import build_on_device
from sparsesearch.kernels.device_select import Selector
from sparsesearch.kernels.dispatch import Backend, run_schedule, tile_shape
from sparsesearch.kernels.schedule import Span, Workers
from sparsesearch.model_shapes import ModelShape
from sparsesearch.rules import Rule, rule_kinds

Row = dict[str, Any]
PROBE = ModelShape("probe", "llama", 4, 3072, 8192, 24, 8, 128, 1024, False, 5e5, 1 << 18)
"""Whole layers of this shape, which no known model has, show what the parts leave out when they run together."""

EVICTING = ModelShape("evicting", "llama", 5, 4096, 13312, 32, 8, 128, 1024, False, 5e5, 1 << 18)
"""The same with weights that each exceed a GPU's cache; also with a single layer, which shows what a step takes besides its layers."""

PROBE_KV_TOKENS = 4096
SLOW_S = 0.05
HAVE_KERNELS = ("vertical_slash", "pooled_topk")
"""Dynamic rules whose choice is a few launches for any number of heads, which a graph can hold."""

MANY_HEADS = 64
LAYER_WIDTHS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096), (2048, 2048), (8192, 8192))


@dataclass(frozen=True)
class RunPlan:
    """What a calibration measures.

    Attributes:
        tile_kinds: (head_dim, block_tokens) of the tile kernel.
        decode: (batch, keys per sequence); 8 KV heads of four query heads.
        decode_head_dims: head sizes of decoding.
        gemm_tokens: rows of the activations of a linear layer.
        gemm_widths: (outputs, inputs) of a linear layer.
        pointwise_tokens: rows of the activations of norms and the like.
        estimator_tokens: prompt lengths of the dynamic rules.
        layer_batches: batches of whole decoding layers.
        layer_tokens: prompt lengths of whole layers.
        peak_side: side of the matrices whose product is the peak.
        longest_tokens: tile cases beyond this length are left out.
        time_share: share of the usual time per case.
    """

    tile_kinds: tuple[tuple[int, int], ...] = ((128, 128), (64, 128), (128, 64), (64, 64))
    decode: tuple[tuple[int, int], ...] = (
        (1, 1024), (1, 4096), (1, 16384), (1, 65536), (1, 131072), (4, 8192), (8, 512), (8, 2048), (8, 32768), (32, 512), (32, 4096),
        (32, 8192),
    )  # fmt: skip
    decode_head_dims: tuple[int, ...] = (64, 128)
    gemm_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192, 32768)
    gemm_widths: tuple[tuple[int, int], ...] = LAYER_WIDTHS
    pointwise_tokens: tuple[int, ...] = (1, 8, 32, 1024, 8192, 65536)
    estimator_tokens: tuple[int, ...] = (4096, 16384, 65536)
    layer_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    layer_tokens: tuple[int, ...] = (4096, 8192, 16384, 65536)
    peak_side: int = 8192
    longest_tokens: int = 1 << 20
    time_share: float = 1.0

    @property
    def count(self) -> int:
        """Rows to expect, for a progress bar; a few large cases may be left out."""
        tiles = sum(case.length <= self.longest_tokens for kind in self.tile_kinds for case in tile_cases(*kind))
        decode, gemm = len(self.decode) * len(self.decode_head_dims), len(self.gemm_tokens) * len(self.gemm_widths)
        layers = 3 * len(self.layer_batches) + len(self.layer_tokens)
        return (
            4
            + tiles
            + decode
            + gemm
            + layers
            + 5 * len(self.pointwise_tokens)
            + len(self.estimator_tokens) * (1 + len(estimators()))
            + len(self.estimator_tokens[:2]) * len(HAVE_KERNELS)
        )


FULL = RunPlan()
QUICK = RunPlan(
    tile_kinds=((128, 128),),
    decode=((1, 4096), (8, 32768)),
    decode_head_dims=(128,),
    gemm_tokens=(1, 512, 8192),
    gemm_widths=((4096, 4096), (14336, 4096)),
    pointwise_tokens=(1, 1024, 8192),
    estimator_tokens=(4096, 16384),
    layer_batches=(1, 8),
    layer_tokens=(4096, 16384),
    longest_tokens=16384,
    time_share=0.4,
)


class Bench:
    """A device, what runs on it, and the time that a case may take."""

    def __init__(
        self, device: str, kernel: Backend, dtype: torch.dtype, *, time_share: float = 1.0, seed: int = 0
    ) -> None:
        self.device, self.kernel, self.dtype, self.time_share = device, kernel, dtype, time_share
        self.workers = Workers.of(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Random data: zeros draw less power and run faster."""
        return torch.randn(shape, device=self.device, generator=self.generator, dtype=self.dtype)

    def copies(self, nbytes: float, most: int = 8) -> int:
        """How many inputs of this size take turns, so that the cache holds none of them."""
        return max(1, min(most, int(2.5 * self.workers.l2_bytes // max(nbytes, 1.0)) + 1))

    def time(self, run: Callable[[int], object], *, copies: int = 1, warm_s: float = 0.12, graph: bool = True) -> Timed:
        """Sustained time of `run(copy)`."""
        warm_s, measure_s = warm_s * self.time_share, 0.08 * self.time_share
        return sustained(run, device=self.device, copies=copies, warm_s=warm_s, measure_s=measure_s, graph=graph)

    def row(self, group: str, timed: Timed, **values: Any) -> Row:
        """One result."""
        return {"group": group, **values, "seconds": timed.seconds, "spread": timed.spread}


def all_runs(bench: Bench, plan: RunPlan) -> Iterator[Row]:
    """Every group in turn."""
    yield from peak_runs(bench, plan.peak_side)
    for head_dim, block_tokens in plan.tile_kinds:
        cases = [case for case in tile_cases(head_dim, block_tokens) if case.length <= plan.longest_tokens]
        yield from tile_runs(bench, cases)
    yield from decode_runs(bench, plan.decode, plan.decode_head_dims)
    yield from gemm_runs(bench, plan.gemm_tokens, plan.gemm_widths)
    yield from pointwise_runs(bench, plan.pointwise_tokens)
    yield from estimator_runs(bench, plan.estimator_tokens)
    yield from estimator_runs(bench, plan.estimator_tokens[:2], HAVE_KERNELS, heads=MANY_HEADS)
    yield from permutation_runs(bench, plan.estimator_tokens)
    yield from layer_runs(bench, plan.layer_batches, plan.layer_tokens)


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


def decode_runs(bench: Bench, shapes: Sequence[tuple[int, int]], head_dims: Sequence[int]) -> Iterator[Row]:
    """One query per head against its cache."""
    for head_dim in head_dims:
        for batch, tokens in shapes:
            pairs = batch * 8
            copies = bench.copies(4.0 * pairs * tokens * head_dim)
            caches = [[bench.normal(pairs * tokens, head_dim) for _ in "kv"] for _ in range(copies)]
            q = bench.normal(batch, 32, head_dim)
            starts = torch.arange(pairs, device=bench.device) * tokens
            lens = torch.full((pairs,), tokens, device=bench.device, dtype=torch.int32)

            def run(copy: int) -> object:
                k, v = caches[copy]  # noqa: B023
                return ragged_decode(q, k, v, starts, lens, scale=q.shape[-1] ** -0.5)  # noqa: B023

            timed = bench.time(run, copies=copies, warm_s=0.02)
            yield bench.row(
                "decode", timed, head_dim=head_dim, batch=batch, tokens=tokens, num_kv_heads=8, num_heads=32
            )


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


def estimators() -> dict[str, Rule]:
    """A generous example of every dynamic rule that chooses by itself in a causal prompt."""
    kinds = rule_kinds().items()
    return {kind: r.examples()[-1] for kind, r in kinds if r.dynamic and not r.reuses and not r.needs_layout}


def estimator_runs(
    bench: Bench, tokens: Sequence[int], kinds: Sequence[str] = (), heads: int = 8, head_dim: int = 128
) -> Iterator[Row]:
    """What a dynamic rule takes before attention can start: its choice as the runtime makes it and, on a GPU, the schedule built from it.

    A rule that cannot run here gives a row of group `skipped` with the reason; one that is slow is not tried at longer prompts.
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
    """Tokens gathered in another order."""
    for length in tokens:
        x = bench.normal(heads, length, head_dim)
        order = torch.randperm(length, device=bench.device)
        timed = bench.time(lambda _: x.index_select(1, order), warm_s=0.02)  # noqa: B023
        yield bench.row("permutation", timed, nbytes=float(x.nbytes))


def layer_runs(
    bench: Bench, batches: Sequence[int], tokens: Sequence[int], shape: ModelShape | None = None
) -> Iterator[Row]:
    """Small models of whole layers: decoding steps, and dense prefills."""
    if not batches and not tokens:
        return
    shape = shape or PROBE
    for probe in (EVICTING, replace(EVICTING, num_layers=1)):
        yield from _decode_steps(bench, RandomLlama(probe, bench), batches)
    model = RandomLlama(shape, bench)
    yield from _decode_steps(bench, model, batches)
    for length in tokens:
        case = TileCase("dense", length, shape.head_dim, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads)
        timed = model.prefill(length, [case.schedule(bench.workers, bench.kernel)])
        yield bench.row("layer_prefill", timed, tokens=length)


def _decode_steps(bench: Bench, model: RandomLlama, batches: Sequence[int]) -> Iterator[Row]:
    for batch in batches:
        timed = model.decode(batch, PROBE_KV_TOKENS)
        yield bench.row("layer_decode", timed, batch=batch, probe=model.shape.name, layers=model.shape.num_layers)
