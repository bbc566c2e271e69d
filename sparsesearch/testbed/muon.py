"""Muon: momentum whose matrices are orthogonalised, all matrices of one shape in one batch.

Source: Jordan et al. 2024, Muon (momentum, Newton–Schulz, scale √max(1, rows/columns)); coefficients that change from step to step: Amsel
et al. 2025, Polar Express, arXiv:2505.16932.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalised(matrices: Float[Tensor, "B M N"]) -> Float[Tensor, "B M N"]:
    """About the nearest matrices whose singular values are all 1, in bfloat16."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in _COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    found: Tensor = x.mT if tall else x
    return found


class Muon:
    """Nesterov momentum, orthogonalised; weight decay is decoupled."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        self._groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            self._groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self._average = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self._groups.items()
        }
        self.momentum, self.weight_decay = momentum, weight_decay

    def averages(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Every matrix with its momentum, a view that can be read into a file and written back."""
        return [
            (parameter, self._average[shape][place])
            for shape, group in self._groups.items()
            for place, parameter in enumerate(group)
        ]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every matrix and drop its gradient."""
        for shape, group in self._groups.items():
            gradients = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in group])
            average = self._average[shape].lerp_(gradients, 1 - self.momentum)
            ahead = gradients.lerp(average, self.momentum)
            updates = orthogonalised(ahead).float() * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(group, updates, strict=True):
                parameter.mul_(1 - rate * self.weight_decay).add_(update, alpha=-rate)
                parameter.grad = None
