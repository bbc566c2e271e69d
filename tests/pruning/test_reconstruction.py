"""Closed forms against brute force."""

import itertools

import pytest
import torch

from sparsesearch.errors import SpecError
from sparsesearch.pruning import reconstruction
from sparsesearch.pruning.reconstruction import Elimination, damped, refit


def problem(inputs=9, outputs=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, inputs, generator=generator, dtype=torch.float64) @ torch.randn(
        inputs, inputs, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    root = torch.randn(outputs, outputs, generator=generator, dtype=torch.float64)
    return x, weight, root @ root.t()


def best_loss(weight, covariance, sensitivity, kept):
    """½ tr(F E) of the damped least-squares optimum, by its normal equations."""
    gram = damped(covariance)
    new = torch.zeros_like(weight)
    new[:, kept] = torch.linalg.solve(gram[kept][:, kept], (weight @ gram)[:, kept].t()).t()
    gone = weight - new
    return float(0.5 * (sensitivity * (gone @ gram @ gone.t())).sum())


@pytest.mark.parametrize("waiting", [1, 3, 64])
def test_losses_add_up_to_the_optimum_of_what_is_left(waiting, monkeypatch):
    monkeypatch.setattr(reconstruction, "_WAITING_INPUTS", waiting)
    x, weight, sensitivity = problem()
    covariance = x.t() @ x / len(x)
    state = Elimination.start(weight, covariance, sensitivity)
    for columns in ([3], [7, 1], [0], [8, 2, 4], [5, 6]):
        predicted = state.loss + state.set_losses(torch.tensor([columns]))[0]
        state.remove(torch.tensor(columns))
        expected = best_loss(weight, covariance, sensitivity, state.left.nonzero()[:, 0])
        torch.testing.assert_close(float(state.loss), expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(float(predicted), expected, rtol=1e-9, atol=0)


def test_a_covariance_that_is_none_is_refused():
    state = Elimination.start(torch.ones(2, 6), torch.eye(6), torch.eye(2))
    state.inverse[1, 1] = -1.0
    state.remove(torch.tensor([1]))
    with pytest.raises(SpecError, match="positive definite"):
        state.remove(torch.tensor([0, 2, 3, 4, 5]))


def test_single_losses_are_losses_of_sets_of_one():
    x, weight, sensitivity = problem()
    state = Elimination.start(weight, x.t() @ x / len(x), sensitivity)
    state.remove(torch.tensor([4]))
    singles = state.single_losses()
    for column in range(9):
        if column == 4:
            assert singles[column] == torch.inf
        else:
            alone = float(state.set_losses(torch.tensor([[column]])))
            torch.testing.assert_close(float(singles[column]), alone, rtol=1e-10, atol=0)


def test_the_cheapest_pair_is_found_by_set_loss():
    x, weight, sensitivity = problem(inputs=6)
    covariance = x.t() @ x / len(x)
    state = Elimination.start(weight, covariance, sensitivity)
    pairs = list(itertools.combinations(range(6), 2))
    for pair, found in zip(pairs, state.set_losses(torch.tensor(pairs)).tolist(), strict=True):
        kept = torch.tensor([i for i in range(6) if i not in pair])
        torch.testing.assert_close(found, best_loss(weight, covariance, sensitivity, kept), rtol=1e-9, atol=0)


def test_refit_is_least_squares_up_to_its_ridge(monkeypatch):
    monkeypatch.setattr(reconstruction, "RIDGE", 1e-12)
    x, weight, _ = problem()
    target = torch.randn(400, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = torch.tensor([0, 2, 5])
    new = refit(weight, kept, x.t() @ x / len(x), target.t() @ x / len(x))
    expected = torch.linalg.lstsq(x[:, kept], target).solution.t()
    torch.testing.assert_close(new[:, kept], expected, rtol=1e-6, atol=1e-9)
    assert not new[:, [1, 3, 4, 6, 7, 8]].any()
