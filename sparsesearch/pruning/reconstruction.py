"""Closed-form least squares: what an output projection loses when inputs go, and how the rest can stand in for them.

For inputs x with covariance C (second moment without a bias), removing the columns R and refitting the columns K:

    W'_K = W_K + W_R C_RK C_KK⁻¹,   E = W_R [ (C⁻¹)_RR ]⁻¹ W_Rᵀ,   loss = ½ tr(F E),

F the sensitivity of the output. W' does not depend on F (each output is fitted by itself), the choice of R does.

Source: Kurtic, Frantar, Alistarh 2023, ZipLM, arXiv:2302.04089, section 3.1 (optimal brain surgeon for structures). Differs: the error is
weighted by the Fisher information of the output, and a mean that is taken away may be put into a bias.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.errors import SpecError

RIDGE = 1e-3
"""Share of the mean variance added to every input's where no data are set aside to choose it on."""
_WAITING_INPUTS = 64
"""So many removed inputs are worth a pass over the whole inverse."""


def damped(covariance: Float[Tensor, "I I"], ridge: float | None = None) -> Float[Tensor, "I I"]:
    """A covariance that can be inverted: `ridge` (else `RIDGE`) times the mean variance is added to every variance."""
    share = RIDGE if ridge is None else ridge
    scale = covariance.diagonal().mean().clamp(min=1e-30)
    return covariance + share * scale * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


@dataclass
class Elimination:
    """Inputs leave a projection in steps; what the others would cost follows.

    The loss of a set R of the inputs left is ½ tr(H_RR⁻¹ G_RR), H the inverse of their covariance and G = Wᵀ F W, W refitted so far. With
    H_RR = L Lᵀ, U = H_:R L⁻ᵀ, V = G_:R L⁻ᵀ and M = L⁻¹ G_RR L⁻ᵀ, a step is H − U Uᵀ and G − Z Uᵀ − U Zᵀ, Z = V − ½ U M. Steps wait in U
    and Z until they are worth one pass over H and G, which then also lose their rows and columns of inputs that are gone.

    Attributes:
        inverse: H before the waiting steps.
        behind: G before the waiting steps.
        place: row of each input in both; of no meaning once it is gone.
        left: True for inputs still there.
        down: U of the waiting steps.
        cross: Z of the waiting steps.
        inverse_diagonal: diagonal of H after them.
        behind_diagonal: diagonal of G after them.
        failed: above 0 when a step's H_RR was not positive definite; looked at when steps are caught up with, to spare waits for the device.
        loss: ½ tr(F E) of everything removed so far.
    """

    inverse: Float[Tensor, "L L"]
    behind: Float[Tensor, "L L"]
    place: Int[Tensor, " I"]
    left: Bool[Tensor, " I"]
    down: Float[Tensor, "L S"]
    cross: Float[Tensor, "L S"]
    inverse_diagonal: Float[Tensor, " L"]
    behind_diagonal: Float[Tensor, " L"]
    failed: Int[Tensor, ""]
    loss: Float[Tensor, ""]

    @classmethod
    def start(
        cls, weight: Float[Tensor, "O I"], covariance: Float[Tensor, "I I"], sensitivity: Float[Tensor, "O O"]
    ) -> "Elimination":
        """Nothing removed."""
        own = weight.double()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(covariance.double())))
        behind = own.t() @ sensitivity.double() @ own
        none = inverse[:, :0]
        everything = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
        return cls(
            inverse, behind, everything.cumsum(0) - 1, everything, none, none, inverse.diagonal().clone(),
            behind.diagonal().clone(), inverse.new_zeros((), dtype=torch.int32), inverse.new_zeros(()),
        )  # fmt: skip

    def single_losses(self) -> Float[Tensor, " I"]:
        """What each remaining input would add to the loss if it went alone; inf for those that are gone."""
        losses = 0.5 * self.behind_diagonal / self.inverse_diagonal.clamp(min=1e-30)
        return torch.where(self.left, losses[self.place], torch.inf)

    def set_losses(self, sets: Int[Tensor, "C K"]) -> Float[Tensor, " C"]:
        """What each of some sets of remaining inputs would add to the loss."""
        at = self.place[sets]
        rows, columns = at[:, :, None], at[:, None, :]
        down, cross = self.down[at], self.cross[at]
        inverse = self.inverse[rows, columns] - down @ down.mT
        waiting = cross @ down.mT
        behind = self.behind[rows, columns] - waiting - waiting.mT
        refitted = torch.cholesky_solve(behind, torch.linalg.cholesky(inverse))
        return 0.5 * refitted.diagonal(dim1=-2, dim2=-1).sum(-1)

    def remove(self, columns: Int[Tensor, " K"]) -> None:
        """Take inputs away and refit the rest.

        Raises:
            SpecError: what is left has no positive definite covariance; perhaps some steps late.
        """
        at = self.place[columns]
        down, cross = self.down[at].t(), self.cross[at].t()
        inverse = self.inverse[:, at] - self.down @ down
        behind = self.behind[:, at] - self.cross @ down - self.down @ cross
        factor, failed = torch.linalg.cholesky_ex(inverse[at])
        self.failed = torch.maximum(self.failed, failed)
        step_down, step_cross = _divided(inverse, factor), _divided(behind, factor)
        own = _divided(step_cross[at].t(), factor)
        step_cross = step_cross - 0.5 * step_down @ own
        self.loss = self.loss + 0.5 * own.trace()
        self.inverse_diagonal = self.inverse_diagonal - step_down.square().sum(1)
        self.behind_diagonal = self.behind_diagonal - 2 * (step_down * step_cross).sum(1)
        self.down, self.cross = torch.cat([self.down, step_down], 1), torch.cat([self.cross, step_cross], 1)
        self.left.index_fill_(0, columns, False)  # assigning False would wait for the device
        if self.down.shape[1] >= min(_WAITING_INPUTS, len(self.inverse)):
            self._catch_up()

    def _catch_up(self) -> None:
        """Bring H and G up to date."""
        if self.failed:
            raise SpecError(
                "the covariance of a projection's inputs must be positive definite, but is not: its activations are too large for their "
                "dtype or not finite. Profile with --dtype float32."
            )
        kept = self.place[self.left]
        down, cross = self.down[kept], self.cross[kept]
        self.inverse = self.inverse[kept][:, kept].addmm_(down, down.t(), alpha=-1)
        self.behind = self.behind[kept][:, kept].addmm_(cross, down.t(), alpha=-1).addmm_(down, cross.t(), alpha=-1)
        self.down, self.cross = down[:, :0], cross[:, :0]
        self.inverse_diagonal, self.behind_diagonal = self.inverse_diagonal[kept], self.behind_diagonal[kept]
        self.place = (self.left.cumsum(0) - 1).clamp(min=0)


def _divided(right: Float[Tensor, "L K"], factor: Float[Tensor, "K K"]) -> Float[Tensor, "L K"]:
    """Right · factor⁻ᵀ for a lower triangular factor."""
    divided: Tensor = torch.linalg.solve_triangular(factor.t(), right, upper=True, left=False)
    return divided


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
