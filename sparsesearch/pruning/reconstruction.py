"""Closed-form least squares: what an output projection loses when inputs go, and how the rest can stand in for them.

For inputs x with covariance C (second moment without a bias), removing the columns R and refitting the columns K:

    W'_K = W_K + W_R C_RK C_KK⁻¹,   E = W_R [ (C⁻¹)_RR ]⁻¹ W_Rᵀ,   loss = ½ tr(F E),

F the sensitivity of the output. W' does not depend on F (each output is fitted by itself), the choice of R does.

Source: Kurtic, Frantar, Alistarh 2023, ZipLM, arXiv:2302.04089, section 3.1 (optimal brain surgeon for structures). Differs: the error is
weighted by the Fisher information of the output, and a mean that is taken away may be put into a bias.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-3
"""Share of the mean variance added to every input's where no data are set aside to choose it on."""


def damped(covariance: Float[Tensor, "I I"], ridge: float | None = None) -> Float[Tensor, "I I"]:
    """A covariance that can be inverted: `ridge` (else `RIDGE`) times the mean variance is added to every variance."""
    share = RIDGE if ridge is None else ridge
    scale = covariance.diagonal().mean().clamp(min=1e-30)
    return covariance + share * scale * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


@dataclass
class Elimination:
    """Inputs leave a projection in steps; weights and inverse covariance follow.

    Attributes:
        weight: refitted so far; columns of removed inputs are zero.
        inverse: inverse of the remaining inputs' covariance, in the rows and columns of what is left.
        sensed: F times the weight.
        left: True for inputs still there.
        loss: ½ tr(F E) of everything removed so far.
    """

    weight: Float[Tensor, "O I"]
    inverse: Float[Tensor, "I I"]
    sensed: Float[Tensor, "O I"]
    left: Tensor
    loss: float = 0.0

    @classmethod
    def start(
        cls, weight: Float[Tensor, "O I"], covariance: Float[Tensor, "I I"], sensitivity: Float[Tensor, "O O"]
    ) -> "Elimination":
        """Nothing removed."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(covariance.double())))
        left = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        return cls(weight.double().clone(), inverse, sensitivity.double() @ weight.double(), left)

    def single_losses(self) -> Float[Tensor, " I"]:
        """What each remaining input would add to the loss if it went alone; inf for those that are gone."""
        behind = (self.sensed * self.weight).sum(0)
        return torch.where(self.left, 0.5 * behind / self.inverse.diagonal().clamp(min=1e-30), torch.inf)

    def set_loss(self, columns: Tensor) -> float:
        """What a set of remaining inputs would add to the loss."""
        block = self.inverse[columns][:, columns]
        refitted = torch.linalg.solve(block, self.weight[:, columns].t()).t()
        return float(0.5 * (self.sensed[:, columns] * refitted).sum())

    def remove(self, columns: Tensor) -> None:
        """Take inputs away and refit the rest."""
        self.loss += self.set_loss(columns)
        rows = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])
        self.weight -= self.weight[:, columns] @ rows
        self.sensed -= self.sensed[:, columns] @ rows
        self.inverse -= self.inverse[:, columns] @ rows
        self.left[columns] = False
        self.weight[:, columns] = self.sensed[:, columns] = 0.0
        self.inverse[columns] = 0.0
        self.inverse[:, columns] = 0.0


def refit(
    weight: Float[Tensor, "O I"],
    kept: Tensor,
    inputs_cross: Float[Tensor, "I I"],
    target_cross: Float[Tensor, "O I"],
    ridge: float | None = None,
) -> Float[Tensor, "O I"]:
    """Weights on the kept inputs that best reproduce a target, pulled towards the present ones where data say nothing.

    minimise ‖target − x W'ᵀ‖² + ridge·‖W' − W_K‖²; columns of removed inputs are zero.

    Args:
        weight: present weights.
        kept: positions of the inputs that stay.
        inputs_cross: mean of x xᵀ (or covariance).
        target_cross: mean of target xᵀ (or covariance).
        ridge: share of the mean variance; `RIDGE` by default.
    """
    result = torch.zeros_like(weight, dtype=torch.float64)
    if not len(kept):
        return result
    own = weight[:, kept].double()
    gram = inputs_cross[kept][:, kept].double()
    right = target_cross[:, kept].double() - own @ gram
    change = torch.cholesky_solve(right.t(), torch.linalg.cholesky(damped(gram, ridge))).t()
    result[:, kept] = own + change
    return result
