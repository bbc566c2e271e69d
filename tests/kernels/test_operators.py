"""Every operator we register: torch's own checks, torch.compile without a graph break, and CUDA graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prefill_cases import CASES, make_call
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels import cache_ops, ops, page_ops, row_copies, step_ops
from sparsesearch.kernels.device_schedule import build_on_device
from sparsesearch.kernels.dispatch import run_schedule
from sparsesearch.kernels.schedule import TileShape, Workers, build_schedule
from sparsesearch.kernels.triton_index import block_mass, pooled_means
from sparsesearch.kernels.triton_select import keep_best

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def _ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def _prefill(kernel: str) -> tuple[Any, ...]:
    head_dim, block = (64, 128) if kernel == "gluon" else (16, 16)
    call = make_call(CASES[8], head_dim=head_dim, block=block, unit=block, dtype=DTYPE, device=DEVICE)
    schedule = build_schedule(
        call.spans, call.tiles, num_kv_heads=2, shape=TileShape(block, block), workers=Workers(3), device=DEVICE
    )
    return (
        call.q, call.k, call.v, None, None, None, schedule.tiles, schedule.entries, schedule.bin_ptr, schedule.merges,
        call.scale, True, block, block, schedule.num_slots, False, kernel,
    )  # fmt: skip


def _decode() -> tuple[Any, ...]:
    rows = _normal(200, 16)
    return (
        _normal(2, 4, 16),
        rows,
        rows.flip(0),
        _ints(0, 7, 80, 190, dtype=torch.int64),
        _ints(5, 70, 0, 1),
        None,
        0.25,
        64,
    )


def _pairs() -> tuple[Tensor, ...]:
    """Keys, values, first rows, room, sinks and windows of four pairs: two windows, one that keeps all, one that keeps nothing."""
    rows = [_normal(200, 16, seed=seed) for seed in (2, 3)]
    start, room = _ints(0, 50, 100, 150, dtype=torch.int64), _ints(48, 48, 48, 48)
    return *rows, start, room, _ints(1, 1, 0, 1), _ints(2, 1 << 22, 0, 2)


def _append(kernel: bool) -> tuple[Any, ...]:
    new = _normal(2, 2, 1, 16), _normal(2, 2, 1, 16, seed=1)
    slots = torch.zeros((), dtype=torch.int64, device=DEVICE)
    return *new, *_pairs(), _ints(47, 20, 30, 48), _ints(47, 20, 0, 48), slots, 16, kernel


def _fill(kernel: bool) -> tuple[Any, ...]:
    new = _normal(2, 2, 45, 16), _normal(2, 2, 45, 16, seed=1)
    return *new, *_pairs(), _ints(45, 33), _ints(0, 12), _ints(0, 0, 0, 0), 16, kernel


def _linear() -> tuple[Any, ...]:
    squares = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows = _normal(3, 40), _normal(66, 40, seed=1), _normal(66, seed=2), _normal(3, 33, seed=3)
    return *rows, squares, _normal(33, seed=4), 1.0, True  # also of squares that a replay draws below zero


def _turn() -> tuple[Any, ...]:
    """Two sequences with 4 query heads and 2 KV heads of 16 columns, and their norms."""
    return (
        _normal(2, 128),
        _normal(2, 16, seed=1),
        _normal(2, 16, seed=2),
        _normal(16, seed=3),
        _normal(16, seed=4),
        1e-5,
        4,
    )


def _pages() -> tuple[Any, ...]:
    """Two sequences of 47 and 33 tokens in blocks of 16, room for 50; both KV heads choose, the second's heads first, one of them not."""
    low, high = _normal(2, 2, 4, 16, seed=1), _normal(2, 2, 4, 16, seed=1) + 1
    start, seen = _ints(0, 50, 100, 150, dtype=torch.int64), _ints(47, 47, 33, 33)
    both, places = _ints(0, 1, dtype=torch.int64), _ints(2, 3, 0, dtype=torch.int64)
    return _normal(2, 4, 16), _normal(200, 16, seed=2), low, high, start, seen, both, both, places, _ints(2, 1), 1, 16


_HEADS, _ORDER = (3, 0), (4, 2, 0, 1, 3, 6, 5)
OPERATORS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "tile_prefill": (ops.tile_prefill, lambda: _prefill("triton")),
    "ragged_decode": (ops.ragged_decode, _decode),
    "append_token": (cache_ops.append_token, lambda: _append(True)),
    "append_token on a CPU": (cache_ops.append_token, lambda: _append(False)),
    "fill_prompt": (cache_ops.fill_prompt, lambda: _fill(True)),
    "fill_prompt on a CPU": (cache_ops.fill_prompt, lambda: _fill(False)),
    "gathered_decode": (cache_ops.gathered_decode, _decode),
    "pages_by_bounds": (page_ops.pages_by_bounds, _pages),
    "skinny_linear": (step_ops.skinny_linear, _linear),
    "scale_rows": (step_ops.scale_rows, lambda: (_normal(3, 40), _normal(40, seed=1))),
    "rotate": (step_ops.rotate, _turn),
    "rotate_append": (step_ops.rotate_append, lambda: (*_turn(), *_append(True)[2:-1])),
    "take_rows": (
        row_copies.take_rows,
        lambda: (_normal(2, 4, 7, 16), _ints(*_HEADS, dtype=torch.int64), _ints(*_ORDER, dtype=torch.int64)),
    ),
    "put_rows": (
        row_copies.put_rows,
        lambda: (
            _normal(2, 4, 7, 16), _normal(2, 2, 7, 16, seed=1), _ints(*_HEADS, dtype=torch.int64), _ints(*_ORDER, dtype=torch.int64)
        ),
    ),
}  # fmt: skip
if ON_GPU and torch.cuda.get_device_capability()[0] == 9:
    OPERATORS["tile_prefill on Hopper"] = (ops.tile_prefill, lambda: _prefill("gluon"))
each = pytest.mark.parametrize("name", OPERATORS)
PLAIN_TORCH = ("append_token on a CPU", "fill_prompt on a CPU", "gathered_decode")  # they read sizes back to the host


def _results(operator: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What the operator returns, then what it may have changed."""
    returned = operator(*arguments)
    outputs = [] if returned is None else [returned] if isinstance(returned, Tensor) else list(returned)
    return [*outputs, *(x for x in arguments if isinstance(x, Tensor))]


def _assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_none_is_left_out() -> None:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparsesearch::")}
    assert {name.split()[0] for name in OPERATORS} == {name for name in names if not name.startswith("bench_")}


@each
def test_contract(name: str) -> None:
    """Schema, mutation, aliasing, shapes of the fake version (dynamic ones included), and what autograd does."""
    operator, arguments = OPERATORS[name]
    torch.library.opcheck(operator, arguments())


@each
def test_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()  # all of these share one code object, which Dynamo recompiles a few times only
    operator, make = OPERATORS[name]
    expected = _results(operator, make())
    compiled = torch.compile(lambda *xs: _results(operator, xs), fullgraph=True, backend="aot_eager")
    _assert_same(compiled(*make()), expected)


@pytest.mark.gpu
@each
def test_replays(name: str) -> None:
    """A captured call reads its inputs anew at every replay."""
    if name in PLAIN_TORCH:
        pytest.skip("plain PyTorch for a CPU: reads sizes back to the host")
    operator, make = OPERATORS[name]
    operator(*make())  # compiles
    arguments = make()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _results(operator, arguments)
    for _ in range(2):
        fresh = tuple(torch.randn_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in make())
        for mine, other in zip(arguments, fresh, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(other)
        graph.replay()
        _assert_same(got, _results(operator, fresh))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["graph", "compile"])
def test_index_kernels(way: str) -> None:
    """They are not operators: Dynamo traces their launches, and a graph holds them."""
    grid = BlockGrid(300, 300, 64)

    def index(q: Tensor, k: Tensor, lse: Tensor, budget: Tensor) -> list[Tensor]:
        means = pooled_means(q, grid, start=0)
        scores = block_mass(q, k, lse, grid)
        return [means, scores, keep_best(scores, budget, grid, sink_blocks=1)]

    def make(seed: int) -> tuple[Tensor, ...]:
        q, k = _normal(4, 300, 64, seed=seed), _normal(2, 300, 64, seed=seed + 1)
        return q, k, torch.full((4, 300), 3.0, device=DEVICE), torch.full((grid.num_q_blocks,), 2, dtype=torch.int32, device=DEVICE)  # fmt: skip

    expected = index(*make(5))
    if way == "compile":
        _assert_same(torch.compile(index, fullgraph=True, backend="aot_eager")(*make(5)), expected)
        return
    static = make(0)
    index(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = index(*static)
    for mine, other in zip(static, make(5), strict=True):
        mine.copy_(other)
    graph.replay()
    _assert_same(got, expected)


@pytest.mark.gpu
def test_schedules_built_on_the_device_replay() -> None:
    """Choice, schedule and attention in one graph: the tiles may change between replays."""
    call = make_call(CASES[2], head_dim=64, block=128, unit=128, dtype=DTYPE, device=DEVICE)
    shape = TileShape(128, 128)

    def attend(tiles: Tensor) -> Tensor:
        schedule = build_on_device(call.spans, [tiles], shape=shape, workers=Workers(3))
        return run_schedule(call.q, call.k, call.v, schedule, scale=call.scale, kernel="triton")[0]

    grid = call.spans[0].grid
    dense = grid.reachable().expand(4, -1, -1).contiguous().to(DEVICE)
    diagonal = grid.diagonal().expand(4, -1, -1).contiguous().to(DEVICE)
    expected = [attend(dense), attend(diagonal)]
    assert not torch.equal(*expected)
    static = dense.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(static)
    for tiles, right in ((diagonal, expected[1]), (dense, expected[0])):
        static.copy_(tiles)
        graph.replay()
        assert torch.equal(got, right)


@pytest.mark.gpu
def test_the_bench_reads_everything() -> None:
    from sparsesearch.bench.triton_read import read_both

    keys, values = (torch.randint(-9, 9, (100_003,), dtype=torch.int32, device=DEVICE) for _ in "kv")
    assert int(read_both(keys, values).sum()) == int(keys.sum() + values.sum())
