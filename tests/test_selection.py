"""Top-k and top-p against a plain sort, ties included."""

import pytest
import torch

from sparsesearch.selection import top_k, top_p

SHAPES = [(1,), (63,), (3, 64), (2, 5, 37)]


def scores(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) * 100 + shape[-1]))
    match kind:
        case "ties":
            return (x * 2).round() / 2  # many equal values, both zeros among them
        case "hidden":
            return x.masked_fill(x < 0, -torch.inf)
        case "forced":
            return x.masked_fill(x > 1, torch.inf)
    return x * 1e-30


def expected(x: torch.Tensor, count: int) -> torch.Tensor:
    chosen = torch.zeros_like(x, dtype=torch.bool)
    for row, mask in zip(x.reshape(-1, x.shape[-1]), chosen.view(-1, x.shape[-1]), strict=True):
        order = sorted(range(len(row)), key=lambda j, row=row: (-float(row[j]), j))
        mask[order[:count]] = True
    return chosen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["ties", "hidden", "forced", "tiny"])
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_top_k(shape: tuple[int, ...], kind: str, count: int) -> None:
    x = scores(shape, kind)
    assert torch.equal(top_k(x, count), expected(x, count))


def test_top_k_with_a_budget_per_row() -> None:
    x = scores((2, 5, 37), "ties")
    count = torch.tensor([0, 1, 5, 36, 50])[:, None]
    got = top_k(x, count)
    for row in range(5):
        assert torch.equal(got[:, row], expected(x[:, row], int(count[row])))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["ties", "tiny"])
def test_top_p_is_the_smallest_set_with_its_share(shape: tuple[int, ...], share: float, kind: str) -> None:
    weights = scores(shape, kind).abs()
    chosen = top_p(weights, share, torch.zeros(shape[-1], dtype=torch.bool))
    held = torch.where(chosen, weights, 0).double().sum(-1)
    total = weights.double().sum(-1)
    assert (held >= share * total * (1 - 2e-6)).all()
    least = weights.double().masked_fill(~chosen, torch.inf).amin(-1)
    assert (held - least < share * total).all(), "without its last entry it falls short"
    assert (least >= weights.masked_fill(chosen, -1.0).amax(-1)).all()


def test_what_is_in_anyway_counts_first() -> None:
    weights, always = torch.tensor([0.1, 0.4, 0.3, 0.2]), torch.tensor([False, False, False, True])
    assert top_p(weights, 0.55, always).tolist() == [False, True, False, True]
    assert top_p(weights, 0.1, always).tolist() == [False, False, False, True]


def test_nothing_to_share() -> None:
    weights, nothing = torch.zeros(2, 5), torch.zeros(5, dtype=torch.bool)
    assert not top_p(weights, 0.9, nothing).any()
