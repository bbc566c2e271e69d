"""Dynamic rules on a GPU: the CPU's choice, no wait for the host, the same bits every time; and the bench that times them."""

import pytest
import torch

from sparsesearch.bench.rules import CASES, no_host_wait, run, untimed_kinds
from sparsesearch.block_mask import BlockGrid
from sparsesearch.rules import Rule, parse_rule, rule_kinds

KINDS = [kind for kind in rule_kinds().values() if kind.dynamic and not kind.needs_layout and not kind.reuses]
DYNAMIC = [rule for kind in KINDS for rule in kind.examples()]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GRIDS = [BlockGrid(1000, 1000, 64), BlockGrid(130, 513, 64), BlockGrid(1, 700, 64), BlockGrid(8192, 8192, 64)]


def tensors(grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(grid.kv_len)
    return (
        torch.randn(2, 3, grid.q_len, 32, generator=generator) * 0.3,
        torch.randn(2, 3, grid.kv_len, 32, generator=generator),
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("rule", DYNAMIC, ids=lambda rule: rule.label)
def test_a_gpu_chooses_as_the_cpu_without_waiting(rule: Rule, grid: BlockGrid) -> None:
    """Scores differ in their last bits, so rows of nearly equal scores may differ."""
    q, k = tensors(grid)
    expected = rule.select(grid, q, k)
    on_gpu = q.cuda(), k.cuda()
    rule.select(grid, *on_gpu)
    with no_host_wait():
        tiles = rule.select(grid, *on_gpu)
    assert torch.equal(tiles, rule.select(grid, *on_gpu)), "the same bits every time"
    assert (tiles.cpu() != expected).float().mean() <= 2e-3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rule", DYNAMIC, ids=lambda rule: rule.label)
def test_choices_can_be_captured_in_a_graph(rule: Rule) -> None:
    grid = BlockGrid(1000, 1000, 64)
    q, k = (x.cuda() for x in tensors(grid))
    expected = rule.select(grid, q, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tiles = rule.select(grid, q, k)
    graph.replay()
    assert torch.equal(tiles, expected)


def test_every_dynamic_rule_is_timed() -> None:
    assert not untimed_kinds()


def test_the_bench_runs_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsesearch.bench.rules.NUM_HEADS", 2)
    record = run(lengths=(512,), device="cpu")
    assert [row["rule"] for row in record["rows"]] == [parse_rule(data, where="tests").label for _, data in CASES]
    assert all(0 < row["density"] <= 1 for row in record["rows"])
