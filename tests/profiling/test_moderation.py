"""Losses estimated from few probes: what is luck goes, what is real stays."""

import numpy as np
import pytest
from numpy import ndarray
from scipy.special import polygamma

from sparsesearch.profiling.moderation import inverse_trigamma, moderated, shrunk

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


def test_slopes_that_sequences_contradict_are_drawn_to_zero() -> None:
    """And the more surely the rarer a real one is: less error than the means have, and the luckiest is no longer one of mere noise."""
    draw = np.random.default_rng(4)
    real = np.where(draw.random(ERROR.shape) < 0.1, 4.0, 0.2) * draw.normal(size=ERROR.shape)
    true = real * np.sqrt(ERROR)
    slopes = true + 3.0 * np.sqrt(ERROR) * draw.normal(size=(8, *ERROR.shape))
    steadied, mean = shrunk(slopes, ERROR), slopes.mean(0)
    scaled = [np.square((values - true) / np.sqrt(ERROR)).mean() for values in (steadied, mean)]
    assert scaled[0] < 0.75 * scaled[1]
    assert (np.abs(steadied) <= np.abs(mean)).all()
    assert (np.sign(steadied) * np.sign(mean) >= 0).all()


def test_slopes_that_all_sequences_agree_on_stay_and_mere_noise_goes() -> None:
    noise = np.random.default_rng(5).normal(size=(8, *ERROR.shape)) * np.sqrt(ERROR)
    steady = np.broadcast_to(ERROR, noise.shape)
    np.testing.assert_allclose(shrunk(steady, ERROR), ERROR, rtol=1e-9)
    left = np.abs(shrunk(noise, ERROR)).sum() / np.abs(noise.mean(0)).sum()
    assert left < 0.3
    np.testing.assert_array_equal(shrunk(noise[:1], ERROR), noise[0]), "one sequence says nothing of its noise"
    now = ERROR.copy()
    now[:, 0] = 0.0
    assert (shrunk(noise * (now > 0), now)[:, 0] == 0).all()
