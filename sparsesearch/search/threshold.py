"""Sparse-vDiT's own rule of choice, as a named baseline: head by head, without a budget."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.errors import SpecError


def threshold_choice(
    error: Float[ndarray, "*units C"],
    density: Float[ndarray, "*units C"],
    *,
    dense_index: int,
    weight: float = 0.5,
    threshold: float = 1.0,
) -> Int[ndarray, "*units"]:
    """Argmin over the sparse candidates of error + weight·density; dense where every one of them exceeds the threshold.

    Source: Sparse-vDiT, arXiv:2506.03065, section 3.3 (λ = 0.5, ε = 1; its algorithm 1 prints λ·S, its text λ(1 - S), S the sparsity; the
    text's is meant). Differs: error is whatever the table holds, relative output error in our profiles; the paper's mean square error has
    the scale of the hidden states, so its ε does not carry over. The paper goes through steps and layers in order and measures each on what
    the choices before it left; profile again under the plan for that.

    Raises:
        SpecError: there is no candidate but dense.
    """
    if error.shape[-1] < 2:
        raise SpecError("there must be a candidate besides dense.")
    objective = np.array(error + weight * density, float)
    objective[..., dense_index] = np.inf
    best = objective.argmin(-1)
    return np.asarray(np.where(objective.min(-1) > threshold, dense_index, best))
