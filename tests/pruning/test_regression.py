"""Fits from sums: least squares where data are many, and the ridge that does best on what was set aside."""

import pytest
import torch

from sparsesearch.pruning.regression import RIDGES, Regression

INPUTS, OUTPUTS = 6, 4


def batches(count, *, tokens=50, noise=0.0):
    """Inputs with a mean and correlations; targets of a linear map with an offset."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(INPUTS, INPUTS, generator=generator)
    true = torch.randn(OUTPUTS, INPUTS, generator=generator)
    for _ in range(count):
        x = torch.randn(tokens, INPUTS, generator=generator) @ mix + 1.5
        target = x @ true.t() - 0.7 + noise * torch.randn(tokens, OUTPUTS, generator=generator)
        yield x, target


def regression(data, *, with_bias):
    found = Regression(torch.zeros(OUTPUTS, INPUTS), with_bias)
    for number, (x, target) in enumerate(data):
        found.add(number, x, target)
    return found


@pytest.mark.parametrize("with_bias", [True, False])
def test_many_clean_tokens_give_least_squares_on_the_kept_inputs(with_bias):
    data, kept = list(batches(8)), torch.tensor([0, 2, 5])
    new = regression(data, with_bias=with_bias).solve(kept)
    x, target = (torch.cat(parts).double() for parts in zip(*data, strict=True))
    design = torch.cat([x[:, kept], torch.ones(len(x), 1)], 1) if with_bias else x[:, kept]
    expected = torch.linalg.lstsq(design, target).solution.t()
    torch.testing.assert_close(new.weight[:, kept].double(), expected[:, :3], rtol=2e-3, atol=2e-3)
    assert not new.weight[:, [1, 3, 4]].any()
    if with_bias:
        torch.testing.assert_close(new.bias.double(), expected[:, 3], rtol=5e-3, atol=5e-3)
    else:
        assert new.bias is None


@pytest.mark.parametrize(("tokens", "noise"), [(3, 20.0), (200, 0.01)])
def test_the_ridge_has_the_least_error_on_the_batches_set_aside(tokens, noise):
    data, kept = list(batches(8, tokens=tokens, noise=noise)), torch.arange(INPUTS)
    found = regression(data, with_bias=True)
    x, target = (torch.cat([data[number][part] for number in (3, 7)]).double() for part in (0, 1))
    errors = {}
    for ridge in RIDGES:
        weight, bias = found._solved(found.fit, kept, ridge)
        errors[ridge] = float((x @ weight.t() + bias - target).square().mean())
    assert found._best_ridge(kept) == min(errors, key=errors.__getitem__)
    assert (found._best_ridge(kept) >= 1e-2) == (tokens == 3), "few noisy tokens call for a strong ridge"


def test_too_few_batches_to_set_any_aside_still_fit():
    found = regression(batches(3), with_bias=True)
    assert found.aside.count == 0
    assert torch.isfinite(found.solve(torch.arange(INPUTS)).weight).all()
