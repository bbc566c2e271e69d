"""Every configuration of the prefill kernels on a GPU: fresh random inputs, poisoned outputs, odd shapes, the fp64 oracle."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from prefill_cases import CASES, Case, assert_close, make_call

from sparsesearch.kernels.dispatch import GLUON_HEAD_DIMS, Backend, choose_backend, prefill, run_schedule
from sparsesearch.kernels.schedule import TileShape, Workers, build_schedule

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _runs(backend: Backend, case: Case, head_dim: int, block: int, dtype: torch.dtype, seed: int) -> None:
    call = make_call(case, head_dim=head_dim, block=block, unit=block, dtype=dtype, device="cuda", seed=seed)
    if backend == "gluon" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("gluon needs a Hopper GPU")
    args = (call.q, call.k, call.v, call.spans, call.tiles)
    result = prefill(*args, scale=call.scale, bias=call.bias, backend=backend)
    assert_close(result.out, result.lse, call)
    for _ in range(3):  # a moving result is a race
        again = prefill(*args, scale=call.scale, bias=call.bias, backend=backend)
        assert torch.equal(again.out, result.out)
        assert torch.equal(again.lse, result.lse)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gluon(head_dim: int, block: int, case: Case) -> None:
    _runs("gluon", case, head_dim, block, torch.bfloat16, seed=head_dim + block)


@pytest.mark.parametrize("case", [CASES[6], CASES[10], CASES[3]], ids=lambda case: case.name)
@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("head_dim", GLUON_HEAD_DIMS)
def test_gluon_head_dims(head_dim: int, block: int, case: Case) -> None:
    _runs("gluon", replace(case, token_major=True), head_dim, block, torch.float16, seed=block)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_gluon_in_turns(head_dim: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of long sequences, on short ones."""
    from sparsesearch.kernels import hopper_prefill  # Triton is an extra

    monkeypatch.setattr(hopper_prefill, "LONG_KEYS", 0)
    _runs("gluon", case, head_dim, 128, torch.bfloat16, seed=head_dim)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("head_dim", "block"), [(64, 64), (128, 128), (96, 32), (256, 64)])
def test_triton(head_dim: int, block: int, case: Case) -> None:
    _runs("triton", case, head_dim, block, torch.bfloat16, seed=block)


@pytest.mark.parametrize("backend", ["gluon", "triton"])
@pytest.mark.parametrize("length", [1, 127, 129, 1000, 2111])
def test_many_tiles_per_worker(backend: Backend, length: int) -> None:
    """More tiles than workers, so that rings and phases wrap across tiles."""
    case = Case("wrap", (length / 128,), (length / 128,), num_heads=24, num_kv_heads=8)
    call = make_call(case, head_dim=128, block=128, unit=128, dtype=torch.bfloat16, device="cuda", seed=length)
    schedule = build_schedule(
        call.spans, call.tiles, num_kv_heads=8, shape=TileShape(128, 128), workers=Workers(7), device="cuda"
    )
    out, lse = run_schedule(call.q, call.k, call.v, schedule, scale=call.scale, kernel=backend)
    assert_close(out, lse, call)


@pytest.mark.parametrize("backend", ["gluon", "triton"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cut_tiles(backend: Backend, head_dim: int) -> None:
    case = Case("long", (1.2,), (30.3,), num_heads=2, num_kv_heads=1, causal=False)
    call = make_call(case, head_dim=head_dim, block=128, unit=128, dtype=torch.bfloat16, device="cuda", seed=3)
    schedule = build_schedule(
        call.spans, call.tiles, num_kv_heads=1, shape=TileShape(128, 128), workers=Workers(16), device="cuda"
    )
    assert schedule.num_slots > 1
    out, lse = run_schedule(call.q, call.k, call.v, schedule, scale=call.scale, kernel=backend)
    assert_close(out, lse, call)


def test_auto_takes_the_fastest() -> None:
    call = make_call(CASES[1], head_dim=128, block=128, unit=128, dtype=torch.bfloat16, device="cuda")
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert choose_backend(call.q, call.k, call.v, call.spans, backend="auto") == ("gluon" if hopper else "triton")


@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_graph_and_compile(backend: Backend) -> None:
    """Replays of a captured graph read new inputs; torch.compile takes the call as one graph."""
    call = make_call(CASES[1], head_dim=128, block=128, unit=128, dtype=torch.bfloat16, device="cuda")
    schedule = build_schedule(
        call.spans, call.tiles, num_kv_heads=2, shape=TileShape(128, 128), workers=Workers(), device="cuda"
    )

    def attend(q: torch.Tensor) -> torch.Tensor:
        return run_schedule(q, call.k, call.v, schedule, scale=call.scale, kernel=backend)[0]

    static = call.q.clone()
    attend(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(static)
    static.copy_(-call.q)
    graph.replay()
    assert torch.equal(captured, attend(-call.q))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(call.q), attend(call.q))
