"""What is timed on a CPU: dense SDPA, tile attention, estimators, mean values and decoding, over lengths and head sizes.

Every case is run once per round, in turn. With one thread its CPU time is taken, which other processes do not lengthen except through
caches and memory, and the median round counts. With more it is the wall clock's time, and the fastest round counts: interference comes and
goes within the minute and only ever adds time. Inputs rotate over several buffers, so that a case does not find its own data in the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter, thread_time

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.base import UnitWork
from sparsesearch.kernels.reference import running_mean
from sparsesearch.kernels.torch_gather import tile_attention_torch
from sparsesearch.rules import Rule, rule_kinds
from sparsesearch.rules.dense_source import DenseSource

MIN_ROUNDS, MAX_ROUNDS = 3, 24
NUM_BUFFERS = 2
BETWEEN_S = 4e-3
"""Linear layers run for so long before each case, as in a model: a short call that follows them takes up to twice its time in a loop, since
matrix instructions lower a processor's clock for a while. A case that takes longer than this has lowered it by itself."""
LAYER_WEIGHTS = 1 << 20
"""Of these linear layers: 4 MB in fp32, so that a call finds neither its data nor its code in the second-level cache, as behind a model's
other layers."""


@dataclass(frozen=True)
class Grid:
    """Which shapes are measured."""

    dense_tokens: tuple[int, ...]
    estimator_tokens: tuple[int, ...]
    tile_tokens: tuple[int, ...]
    call_tokens: tuple[int, ...]  # short prompts of a single head, whose calls cost more than their tiles
    head_dims: tuple[int, ...]
    block_tokens: tuple[int, ...]
    held_out_tokens: tuple[int, ...]
    decode_tokens: tuple[int, ...]
    layer_rows: tuple[int, ...] = ()  # tokens of linear and pointwise layers


FULL = Grid(
    (128, 256, 512, 1024, 2048, 4096, 8192),
    (256, 1024, 4096),
    (512, 2048, 4096),
    (128, 256, 512, 1024),
    (32, 64, 128),
    (32, 64, 128),
    (768, 3072),
    (256, 1024, 4096, 16384),
    (1, 64, 256, 1024, 4096),
)
QUICK = Grid((128, 512, 1024), (128, 512), (512, 1024), (128, 256), (32, 64), (64,), (768,), (128, 1024), (16, 256))


@dataclass
class Case:
    """One thing to time: `run` on the next buffer; `taken_s` is its cost, from all its rounds.

    Where a case is a point of a curve by itself, and many others do not even out its noise, a round has several `runs` of it.
    """

    group: str
    head_dim: int
    tokens: int
    heads: int
    run: Callable[[Tensor, Tensor, Tensor], object]
    work: UnitWork | None = None
    runs: int = 1
    seconds: list[float] = field(default_factory=list)
    taken_s: float = float("nan")


@dataclass(frozen=True)
class Clock:
    """What is read around each case, and which of its rounds counts."""

    name: str
    now: Callable[[], float]
    typical: Callable[[Sequence[float]], float]


CPU_TIME = Clock("CPU time of one thread, median of the rounds, cases interleaved", thread_time, median)
WALL = Clock("fastest of the rounds, cases interleaved", perf_counter, min)


def clock() -> Clock:
    """CPU time where all work is the calling thread's."""
    return CPU_TIME if torch.get_num_threads() == 1 else WALL


def all_cases(shapes: Grid, generator: torch.Generator) -> list[Case]:
    """What is fitted, and what checks the fit."""
    return [*_curve_cases(shapes), *_tile_cases(shapes, generator), *_held_out_cases(shapes, generator)]


def _curve_cases(shapes: Grid) -> list[Case]:
    cases = []
    for head_dim in shapes.head_dims:
        for tokens in shapes.dense_tokens:
            heads = 8 if tokens <= 2048 else 2
            cases.append(Case("dense", head_dim, tokens, heads, _dense(head_dim), runs=4 if tokens <= 2048 else 1))
        for tokens in shapes.decode_tokens:
            cases.append(Case("decode", head_dim, tokens, 4, _one_query))
            grid = BlockGrid(1, tokens, 64)
            cases += [
                Case(step_group(kind), head_dim, tokens, 4, partial(_choosing_query, rule, grid))
                for kind, rule in step_rules().items()
            ]
        for tokens in shapes.estimator_tokens:
            grid = BlockGrid(tokens, tokens, 64)
            cases.append(Case("mean_value", head_dim, tokens, 4, partial(_mean_value, grid)))
            cases += [
                Case(kind, head_dim, tokens, heads, partial(_select, rule, grid))
                for kind, rule in estimators().items()
                for heads in (1, 4)
            ]
    return cases


def estimators() -> dict[str, Rule]:
    """A generous example of every dynamic rule."""
    return {
        kind: rule.examples()[-1]
        for kind, rule in rule_kinds().items()
        if rule.dynamic and not (rule.reuses or rule.needs_layout)
    }


def step_rules() -> dict[str, Rule]:
    """Of these, the rules that choose by themselves for a decoded token."""
    return {kind: rule for kind, rule in estimators().items() if rule.decodes and not isinstance(rule, DenseSource)}


def step_group(kind: str) -> str:
    """Of the cases in which a rule chooses for a decoded token and attends."""
    return f"step {kind}"


def _choosing_query(rule: Rule, grid: BlockGrid, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `runtime.rule_attention` does it: what tells blocks apart is worked out anew from all keys."""
    newest = q[:, :, -1:]
    tiles = rule.select(grid, newest, k)
    return tile_attention_torch(newest, k, v, tiles, grid, scale=q.shape[-1] ** -0.5)


def _select(rule: Rule, grid: BlockGrid, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return rule.left_behind(rule.select(grid, q, k), grid, q, k)


def _mean_value(grid: BlockGrid, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return running_mean(v, grid).to(v.dtype)


def _dense(head_dim: int) -> Callable[[Tensor, Tensor, Tensor], object]:
    return lambda q, k, v: _handed_on(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=head_dim**-0.5))


def _handed_on(out: Float[Tensor, "1 H S D"]) -> Float[Tensor, "1 S H D"]:
    """As the output projection takes it."""
    return out.transpose(1, 2).contiguous()


def _one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, :1], k, v)


def _tile_cases(shapes: Grid, generator: torch.Generator) -> list[Case]:
    """Windows (few distinct row lengths) and random tiles (many), sparse and dense."""
    cases = []
    for head_dim in shapes.head_dims:
        for block in shapes.block_tokens:
            for tokens in shapes.tile_tokens:
                grid = BlockGrid(tokens, tokens, block)
                for share in (0.02, 0.1, 0.3, 0.7):
                    for choose in (_window, _random):
                        cases.append(_tile_case("tiles", head_dim, grid, choose(grid, share, 4, generator)))
            for tokens in shapes.call_tokens:
                grid = BlockGrid(tokens, tokens, block)
                for share in (0.1, 0.5):
                    for choose in (_window, _random):
                        cases.append(_tile_case("tiles", head_dim, grid, choose(grid, share, 1, generator)))
    return cases


def _held_out_cases(shapes: Grid, generator: torch.Generator) -> list[Case]:
    """Lengths, shares and numbers of heads that no fit has seen; dense beside them."""
    cases = []
    for head_dim in shapes.head_dims:
        for tokens in shapes.held_out_tokens:
            cases.append(
                Case("held_out", head_dim, tokens, 4, _dense(head_dim), UnitWork("dense", tokens, tokens, head_dim, 4))
            )
            grid = BlockGrid(tokens, tokens, 64)
            for share, choose in ((0.06, _window), (0.2, _random), (0.4, _window), (0.5, _random)):
                cases.append(_tile_case("held_out", head_dim, grid, choose(grid, share, 3, generator)))
    return cases


def _window(grid: BlockGrid, share: float, heads: int, generator: torch.Generator) -> Bool[Tensor, "H M N"]:
    width = max(1, round(share * grid.num_k_blocks))
    near = grid.q_blocks() - grid.k_blocks() < width
    return (grid.reachable() & (near | (grid.k_blocks() == 0))).expand(heads, -1, -1)


def _random(grid: BlockGrid, share: float, heads: int, generator: torch.Generator) -> Bool[Tensor, "H M N"]:
    chosen = torch.rand(heads, grid.num_q_blocks, grid.num_k_blocks, generator=generator) < share
    return grid.reachable() & (chosen | grid.diagonal())


def _tile_case(group: str, head_dim: int, grid: BlockGrid, tiles: Bool[Tensor, "H M N"]) -> Case:
    heads = tiles.shape[0]
    work = UnitWork(
        kind="tiles",
        q_len=grid.q_len,
        kv_len=grid.kv_len,
        head_dim=head_dim,
        query_heads=heads,
        tiles=float(tiles.sum()),
        query_blocks=grid.num_q_blocks,
        block_tokens=grid.block_tokens,
    )

    picked = torch.arange(heads)

    def run(q: Tensor, k: Tensor, v: Tensor) -> object:
        # heads that share a rule seldom lie side by side, so they are picked from the layer's and put back among them
        own_q, own_k, own_v = (x.index_select(1, picked) for x in (q, k, v))
        out = tile_attention_torch(own_q, own_k, own_v, tiles, grid, scale=head_dim**-0.5)
        return _handed_on(out.index_select(1, picked))

    return Case(group, head_dim, grid.kv_len, heads, run, work)


def measure(
    cases: Sequence[Case],
    time_limit_s: float,
    dtype: torch.dtype,
    generator: torch.Generator,
    progress: Callable[[str, int, int], None],
) -> int:
    """Run rounds over all cases until the time is spent; the number of rounds after the warm-up."""
    start, read = perf_counter(), clock()
    size = max(case.heads * case.tokens * case.head_dim for case in cases)
    pools = [[torch.randn(size, generator=generator).to(dtype) for _ in range(3)] for _ in range(NUM_BUFFERS)]
    between = [torch.ones(size, dtype=dtype) for size in ((64, 256), (LAYER_WEIGHTS // 256, 256))]
    rounds = -1
    with torch.inference_mode():
        while rounds < MAX_ROUNDS and (rounds < MIN_ROUNDS or perf_counter() - start < time_limit_s):
            for case in cases:
                _timed(case, pools[rounds % NUM_BUFFERS], between, read, warm=rounds >= 0)
            rounds += 1
            progress("calibrate", min(round(perf_counter() - start), round(time_limit_s)), round(time_limit_s))
    for case in cases:
        case.taken_s = read.typical(case.seconds)
    progress("calibrate", round(time_limit_s), round(time_limit_s))
    return rounds


def _timed(case: Case, pool: Sequence[Tensor], between: Sequence[Tensor], read: Clock, *, warm: bool) -> None:
    """A round's runs of one case; a first one is not kept."""
    shape = (1, case.heads, case.tokens, case.head_dim)
    q, k, v = (flat[: int(np.prod(shape))].view(shape) for flat in pool)
    for _ in range(case.runs):
        if not case.seconds or min(case.seconds) < BETWEEN_S:
            _linear_layers(*between)
        before = read.now()
        case.run(q, k, v)
        if warm:
            case.seconds.append(read.now() - before)


def _linear_layers(x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"]) -> None:
    begin = perf_counter()
    while perf_counter() - begin < BETWEEN_S:
        F.linear(x, weight)
