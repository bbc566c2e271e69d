"""Losses estimated from few probes: what is luck goes, what is real stays."""

import numpy as np
import pytest
from numpy import ndarray
from scipy.special import polygamma

from sparsesearch.profiling.moderation import inverse_trigamma, moderated

ERROR = np.geomspace(0.2, 0.002, 20)[None, :] * np.geomspace(0.5, 2.0, 16)[:, None]


def sampled(true: ndarray, degrees: int, seed: int) -> ndarray:
    """A variance as so many squared Gaussians have it."""
    return true * np.random.default_rng(seed).chisquare(degrees, true.shape) / degrees


@pytest.mark.parametrize("x", [0.05, 0.5, 3.0, 200.0])
def test_trigamma_is_inverted(x: float) -> None:
    assert inverse_trigamma(float(polygamma(1, x))) == pytest.approx(x, rel=1e-9)


@pytest.mark.parametrize("degrees", [1, 2, 8])
def test_noise_about_a_multiple_of_the_error_is_taken_out(degrees: int) -> None:
    true = 3.0 * ERROR
    estimate = sampled(true, degrees, seed=0)
    steadied = moderated(estimate, ERROR, degrees)
    before, after = (np.abs(np.log(values / true)).mean() for values in (estimate, steadied))
    assert after < before / 3
    picked = [(values / true).min() for values in (estimate, steadied)]
    assert picked[1] > 2 * picked[0], "the luckiest candidate is no longer far below its true loss"


@pytest.mark.parametrize(("degrees", "spread", "least", "most"), [(48, 2.0, 0.0, 0.05), (4, 1.0, 0.1, 0.7)])
def test_heads_that_really_differ_are_drawn_as_little_as_they_are_well_known(
    degrees: int, spread: float, least: float, most: float
) -> None:
    true = ERROR * np.exp(np.random.default_rng(1).normal(0, spread, ERROR.shape))
    estimate = sampled(true, degrees, seed=2)
    prior = ERROR * (estimate.sum() / ERROR.sum())
    weight = (moderated(estimate, ERROR, degrees) - estimate) / (prior - estimate)
    assert np.ptp(weight) < 1e-6, "one weight for a layer"
    assert least < weight[0, 0] < most


def test_rules_that_are_dense_where_it_counts_stay_free() -> None:
    error, estimate = ERROR.copy(), sampled(ERROR, 2, seed=3)
    error[:, 0] = estimate[:, 0] = 0.0
    estimate[3, 5] = 0.0
    steadied = moderated(estimate, error, 2)
    assert (steadied[:, 0] == 0).all()
    assert steadied[3, 5] == 0
    assert (moderated(np.zeros((2, 3)), np.zeros((2, 3)), 2) == 0).all()
