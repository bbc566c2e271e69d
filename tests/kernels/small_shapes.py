"""Every kernel once on small odd shapes, against the oracle: what `sanitize.py` runs under compute-sanitizer. Needs a GPU."""

import sys

import torch
from prefill_cases import CASES, assert_close, make_call
from test_operators import OPERATORS, PLAIN_TORCH

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.device_schedule import build_on_device
from sparsesearch.kernels.dispatch import Backend, prefill, run_schedule
from sparsesearch.kernels.schedule import TileShape, Workers, build_schedule
from sparsesearch.kernels.triton_index import block_mass, pooled_means
from sparsesearch.kernels.triton_select import keep_best

BACKENDS: tuple[Backend, ...] = ("gluon", "triton")


def prefill_kernels() -> None:
    """Tiles of both head widths, all layouts, bias, bitmaps; and more tiles than workers, with cut ones."""
    for case in CASES:
        for head_dim in (64, 128):
            call = make_call(case, head_dim=head_dim, block=128, unit=128, dtype=torch.bfloat16, device="cuda")
            for backend in BACKENDS:
                result = prefill(
                    call.q, call.k, call.v, call.spans, call.tiles, scale=call.scale, bias=call.bias, backend=backend
                )
                assert result.lse is not None
                assert_close(result.out, result.lse, call)
    call = make_call(CASES[1], head_dim=64, block=128, unit=128, dtype=torch.bfloat16, device="cuda")
    for workers in (1, 16):
        schedule = build_schedule(
            call.spans, call.tiles, num_kv_heads=2, shape=TileShape(128, 128), workers=Workers(workers), device="cuda"
        )
        for backend in BACKENDS:
            assert_close(*run_schedule(call.q, call.k, call.v, schedule, scale=call.scale, kernel=backend), call)


def index_kernels() -> None:
    """Scores, selection, and the schedule that is built from it."""
    grid = BlockGrid(200, 300, 64)
    q, k = (torch.randn(heads, rows, 64, device="cuda", dtype=torch.bfloat16) for heads, rows in ((4, 200), (2, 300)))
    pooled_means(q, grid, start=grid.q_start)
    scores = block_mass(q, k, torch.full((4, 200), 3.0, device="cuda"), grid)
    budget = torch.full((grid.num_q_blocks,), 2, dtype=torch.int32, device="cuda")
    chosen = keep_best(scores, budget, grid, sink_blocks=1)
    assert int(chosen.sum(-1).min()) >= 2
    call = make_call(CASES[2], head_dim=64, block=128, unit=128, dtype=torch.bfloat16, device="cuda")
    tiles = [one.choices[list(one.of_head)].cuda() for one in call.tiles]
    schedule = build_on_device(call.spans, tiles, shape=TileShape(128, 128), workers=Workers(3))
    assert_close(*run_schedule(call.q, call.k, call.v, schedule, scale=call.scale, kernel="gluon"), call)


def main() -> None:
    prefill_kernels()
    for name, (operator, arguments) in OPERATORS.items():
        if name not in PLAIN_TORCH:
            operator(*arguments())
    index_kernels()
    torch.cuda.synchronize()
    sys.stdout.write("all kernels ran\n")


if __name__ == "__main__":
    main()
