"""Losses that few probes estimate, steadied by an error that needs none.

A Fisher product is about Gaussian, so a loss is a variance estimated with as many degrees of freedom as there are sequences times probes, and the
best of many candidates is best in part by luck: a search over noisy losses finds the lucky ones, the more surely the more it may choose from.
Estimates of one layer are therefore drawn towards a prior, as far as their spread is no more than what so few probes explain.
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.special import polygamma

_NEWTON_STEPS = 20
_EXACT = 1e-9
"""Share of a layer's output energy below which an error is rounding."""


def moderated(estimate: Float[ndarray, "u C"], error: Float[ndarray, "u C"], degrees: float) -> Float[ndarray, "u C"]:
    """One layer's losses s², drawn towards a multiple of its output errors e: (d·s² + d0·k·e) / (d + d0).

    k is the layer's ratio of both sums. d0 solves Var(log s² - log k·e) = ψ'(d/2) + ψ'(d0/2), the spread of scaled inverse chi-square variances: where
    losses spread no more about k·e than their probes explain, only k·e is left, and where heads really differ, d0 is small beside d.
    Losses of exactly 0 stay: such a rule is dense where it counts.

    Source: the moderated variances of Smyth 2004 (Statistical Applications in Genetics and Molecular Biology 3:3, sections 3 and 6.2), where the
    prior is one constant; here it is a constant times an error that is known without noise.

    Args:
        estimate: mean squares of the probes' products per unit and candidate.
        error: output errors of the same.
        degrees: d, sequences times probes.
    """
    counted: Bool[ndarray, "u C"] = (error > _EXACT) & (estimate > 0)
    if counted.sum() < 2:
        return estimate
    prior = error * (estimate[counted].sum() / error[counted].sum())
    spread = float(np.log(estimate[counted] / prior[counted]).var())
    beyond = spread - float(polygamma(1, degrees / 2))
    weight = 1.0 if beyond <= 0 else (d0 := 2 * inverse_trigamma(beyond)) / (degrees + d0)
    return np.where(counted, (1 - weight) * estimate + weight * prior, estimate)


def shrunk(slopes: Float[ndarray, "n u C"], error: Float[ndarray, "u C"]) -> Float[ndarray, "u C"]:
    """One layer's mean changes of a loss over n sequences, drawn towards 0 as far as sequences contradict each other: m·τ² / (τ² + v / (n·e)).

    m and v are the mean and variance over the sequences. A change m is about Gaussian around a true one whose variance is τ²·e over the layer's units
    and candidates; τ² is what the mean of m²/e leaves above that of v / (n·e). Where changes are no larger than their noise, nothing is left.

    Source: the normal model of parametric empirical Bayes, Morris 1983 (JASA 78:381, section 1); here variances grow with an error that is
    known without noise.

    Args:
        slopes: per sequence, unit and candidate; one sequence says nothing of its noise and is returned as it is.
        error: output errors of the same.
    """
    mean: Float[ndarray, "u C"] = slopes.mean(0)
    counted: Bool[ndarray, "u C"] = error > _EXACT
    if len(slopes) < 2 or not counted.any():
        return mean
    scale = np.where(counted, error, 1.0)
    noise = slopes.var(0, ddof=1) / len(slopes) / scale
    spread = max(0.0, float((mean**2 / scale - noise)[counted].mean()))
    return np.where(counted, mean * (spread / np.maximum(spread + noise, 1e-300)), mean)


def inverse_trigamma(y: float) -> float:
    """The x with ψ'(x) = y > 0, by Newton's method on 1/ψ', which is convex: from below it never overshoots (Smyth 2004, appendix)."""
    x = 0.5 + 1 / y
    for _ in range(_NEWTON_STEPS):
        trigamma = float(polygamma(1, x))
        x += trigamma * (1 - trigamma / y) / float(polygamma(2, x))
    return x
