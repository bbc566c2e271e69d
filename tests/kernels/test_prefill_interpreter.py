"""The portable kernel in Triton's interpreter, against the oracle."""

import pytest
import torch
from prefill_cases import CASES, Case, assert_close, make_call

from sparsesearch.errors import SpecError, UnsupportedKernelError
from sparsesearch.kernels import dispatch
from sparsesearch.kernels.dispatch import prefill, run_schedule
from sparsesearch.kernels.schedule import TileShape, Workers, build_schedule

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU there: test_prefill_gpu.py")


@pytest.fixture(autouse=True)
def _few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dispatch, "workers_of", lambda device: Workers(3, 1e4)
    )  # small cache: sections are exercised too


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_equals_oracle(case: Case) -> None:
    call = make_call(case, head_dim=24, block=32, unit=32, dtype=torch.float32)
    result = prefill(call.q, call.k, call.v, call.spans, call.tiles, scale=call.scale, bias=call.bias, backend="triton")
    assert result.backend == "triton"
    assert_close(result.out, result.lse, call)


@interpreted
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("head_dim", [16, 40])
def test_fp16_and_other_shapes(block: int, head_dim: int) -> None:
    call = make_call(CASES[6], head_dim=head_dim, block=block, unit=block, dtype=torch.float16, seed=block)
    result = prefill(call.q, call.k, call.v, call.spans, call.tiles, scale=call.scale, backend="triton")
    assert_close(result.out, result.lse, call)


@interpreted
@pytest.mark.parametrize("shape", [TileShape(32, 16), TileShape(16, 16)], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[3]], ids=lambda case: case.name)
def test_two_blocks_per_tile_equal_one(case: Case, shape: TileShape) -> None:
    """A tile of two blocks with different lists masks the half that does not attend: what the Hopper kernel does for 64-token blocks."""
    call = make_call(case, head_dim=16, block=16, unit=32, dtype=torch.float32)
    schedule = build_schedule(call.spans, call.tiles, num_kv_heads=2, shape=shape, workers=Workers(2))
    out, lse = run_schedule(call.q, call.k, call.v, schedule, scale=call.scale, kernel="triton")
    assert_close(out, lse, call)


@interpreted
def test_cut_tiles_are_merged() -> None:
    call = make_call(
        Case("long", (0.5,), (12,), num_heads=2, causal=False), head_dim=16, block=16, unit=16, dtype=torch.float32
    )
    schedule = build_schedule(call.spans, call.tiles, num_kv_heads=2, shape=TileShape(16, 16), workers=Workers(4))
    assert schedule.num_slots > 1
    assert len(schedule.merges) >= 1
    out, lse = run_schedule(call.q, call.k, call.v, schedule, scale=call.scale, kernel="triton")
    assert_close(out, lse, call)


def test_reference_backend_equals_oracle() -> None:
    call = make_call(CASES[9], head_dim=8, block=16, unit=32, dtype=torch.float32)
    result = prefill(call.q, call.k, call.v, call.spans, call.tiles, scale=call.scale, backend="reference")
    assert_close(result.out, result.lse, call)


def test_what_cannot_serve_says_why() -> None:
    call = make_call(CASES[1], head_dim=16, block=16, unit=16, dtype=torch.float32)
    args = (call.q, call.k, call.v, call.spans, call.tiles)
    with pytest.raises(UnsupportedKernelError, match="gluon: needs a Hopper GPU"):
        prefill(*args, scale=1.0, backend="gluon")
    with pytest.raises(UnsupportedKernelError, match="softcap"):
        prefill(*args, scale=1.0, softcap=30.0)
    with pytest.raises(UnsupportedKernelError, match="attention sinks"):
        prefill(*args, scale=1.0, sinks=torch.zeros(4))
    with pytest.raises(SpecError, match="Did you mean 'triton'"):
        prefill(*args, scale=1.0, backend="tritn")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedKernelError, match="per-key bias"):
        prefill(*args, scale=1.0, bias=torch.zeros(call.k.shape[:3]), backend="torch")


@interpreted
def test_operator_contract() -> None:
    """Shapes for tracing equal those of the run, and torch.compile takes the call as one graph."""
    call = make_call(CASES[1], head_dim=16, block=16, unit=16, dtype=torch.float32)
    schedule = build_schedule(call.spans, call.tiles, num_kv_heads=2, shape=TileShape(16, 16), workers=Workers(2))
    from sparsesearch.kernels.ops import tile_prefill

    args = (
        call.q, call.k, call.v, None, None, None, schedule.tiles, schedule.entries, schedule.bin_ptr, schedule.merges,
        call.scale, True, 16, 16, schedule.num_slots, False, "triton",
    )  # fmt: skip
    torch.library.opcheck(tile_prefill, args, test_utils=("test_schema", "test_faketensor"))

    def layer(q: torch.Tensor) -> torch.Tensor:
        return run_schedule(q * 2, call.k, call.v, schedule, scale=call.scale, kernel="triton")[0] + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(call.q), layer(call.q))
