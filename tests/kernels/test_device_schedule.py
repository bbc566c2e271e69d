"""The schedule built on the device computes the same blocks as the one built on the host."""

import itertools

import pytest
import torch
from prefill_cases import CASES, Case, assert_close, make_call
from test_schedule import element_masks

from sparsesearch.block_mask import expand
from sparsesearch.errors import SpecError
from sparsesearch.kernels.deal import TILE_OVERHEAD
from sparsesearch.kernels.device_deal import deal_on_device
from sparsesearch.kernels.device_schedule import build_on_device
from sparsesearch.kernels.dispatch import run_schedule
from sparsesearch.kernels.schedule import TileShape, Workers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [TileShape(16, 16), TileShape(32, 16)], ids=str)
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 3, 6, 7, 9, 10)], ids=lambda case: case.name)
def test_computes_exactly_what_was_chosen(case: Case, shape: TileShape) -> None:
    call = make_call(case, head_dim=16, block=16, unit=32, dtype=torch.float32)
    choices = [tiles.choices[list(tiles.of_head)].to(DEVICE) for tiles in call.tiles]
    schedule = build_on_device(call.spans, choices, shape=shape, workers=Workers(5))
    seen = element_masks(schedule, tuple(call.q.shape[:3]), call.k.shape[2])
    expected = torch.zeros_like(seen)
    for span, choice in zip(call.spans, choices, strict=True):
        rows = slice(span.q_offset, span.q_offset + span.grid.q_len)
        keys = slice(span.k_offset, span.k_offset + span.grid.kv_len)
        expected[span.batch, :, rows, keys] = expand(choice.cpu(), span.grid).int()
    assert torch.equal(seen, expected)
    on_device = (x.to(DEVICE) for x in (call.q, call.k, call.v))
    out, lse = run_schedule(*on_device, schedule, scale=call.scale, kernel="triton")
    assert_close(out.cpu(), lse.cpu(), call)


@pytest.mark.parametrize(
    "counts",
    [
        torch.arange(1, 65).repeat(32),  # dense causal heads
        torch.cat([torch.arange(1, 65), torch.full((31 * 64,), 5)]),  # one dense head among narrow ones
        torch.full((7,), 3),  # fewer tiles than workers
        torch.randint(1, 40, (3000,), generator=torch.Generator().manual_seed(0)),
    ],
    ids=["dense", "one_dense", "few", "random"],
)
def test_deal_is_even(counts: torch.Tensor) -> None:
    histogram = torch.bincount(counts).int()
    places = torch.zeros_like(counts, dtype=torch.int32)
    for cost in counts.unique():
        same = (counts == cost).nonzero()[:, 0]
        places[same] = torch.arange(len(same), dtype=torch.int32)
    order, bin_ptr = deal_on_device(*(x.int().to(DEVICE) for x in (counts, places, histogram)), 132)
    order, bin_ptr = order.cpu(), bin_ptr.cpu()
    assert order.sort().values.tolist() == list(range(len(counts)))
    assert (int(bin_ptr[0]), int(bin_ptr[-1])) == (0, len(counts))
    loads = torch.stack([(counts[order[a:b]] + TILE_OVERHEAD).sum() for a, b in itertools.pairwise(bin_ptr)])
    # the light tiles' cuts miss an even share by one of them at most, which is a tenth of it here
    assert float(loads.max()) <= max(1.06 * float(loads.mean()), float(counts.max()) + TILE_OVERHEAD)


def test_refuses_a_choice_of_another_shape() -> None:
    call = make_call(CASES[1], head_dim=1, block=16, unit=32, dtype=torch.float32)
    with pytest.raises(SpecError, match="a choice must be"):
        build_on_device(
            call.spans, [torch.ones(4, 1, 1, dtype=torch.bool)], shape=TileShape(16, 16), workers=Workers(2)
        )
