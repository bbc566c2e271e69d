"""Linear regression from sums over tokens, whose ridge is chosen on tokens that were set aside.

Every fourth batch is set aside. The ridge with the least squared error there wins, and the fit is then repeated on all batches, so
that neither the ridge nor the number of batches has to be guessed, or is ever chosen on held-out data.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.pruning.reconstruction import RIDGE, refit
from sparsesearch.runtime.shrink import Fitted

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_ASIDE_EVERY = 4


@dataclass
class Sums:
    """Sums over tokens of inputs x and targets t, in fp64."""

    xx: Float[Tensor, "I I"]
    tx: Float[Tensor, "O I"]
    x: Float[Tensor, " I"]
    t: Float[Tensor, " O"]
    count: int = 0

    @classmethod
    def zeros(cls, like: Float[Tensor, "O I"]) -> Self:
        """Of no tokens yet."""
        outputs, inputs = like.shape
        empty = like.new_zeros((0,), dtype=torch.float64)
        return cls(
            empty.new_zeros(inputs, inputs), empty.new_zeros(outputs, inputs), empty.new_zeros(inputs),
            empty.new_zeros(outputs),
        )  # fmt: skip

    def add(self, x: Float[Tensor, "N I"], target: Float[Tensor, "N O"]) -> None:
        """Add tokens."""
        x, target = x.float(), target.float()
        self.xx += (x.t() @ x).double()
        self.tx += (target.t() @ x).double()
        self.x += x.double().sum(0)
        self.t += target.double().sum(0)
        self.count += len(x)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.xx + other.xx, self.tx + other.tx, self.x + other.x, self.t + other.t, self.count + other.count
        )

    def about(self, x: Float[Tensor, " I"], t: Float[Tensor, " O"]) -> tuple[Tensor, Tensor]:
        """Mean of (x − x₀)(x − x₀)ᵀ and of (t − t₀)(x − x₀)ᵀ."""
        mean_x, mean_t = self.x / self.count, self.t / self.count
        xx = self.xx / self.count - torch.outer(x, mean_x) - torch.outer(mean_x, x) + torch.outer(x, x)
        tx = self.tx / self.count - torch.outer(t, mean_x) - torch.outer(mean_t, x) + torch.outer(t, x)
        return xx, tx


@dataclass
class Regression:
    """Fits a projection anew.

    Attributes:
        weight: present weights; fits are pulled towards them.
        with_bias: whether the fitted projection has a bias.
        fit: batches to fit on.
        aside: batches to choose the ridge on.
    """

    weight: Float[Tensor, "O I"]
    with_bias: bool
    fit: Sums = field(init=False)
    aside: Sums = field(init=False)

    def __post_init__(self) -> None:
        self.fit, self.aside = Sums.zeros(self.weight), Sums.zeros(self.weight)

    def add(self, batch: int, x: Float[Tensor, "N I"], target: Float[Tensor, "N O"]) -> None:
        """Add the tokens of a batch; its number decides whether it is set aside."""
        (self.aside if batch % _ASIDE_EVERY == _ASIDE_EVERY - 1 else self.fit).add(x, target)

    def solve(self, kept: Tensor) -> Fitted:
        """The projection on the kept inputs; columns of the others are zero."""
        ridge = self._best_ridge(kept) if self.aside.count else RIDGE
        weight, bias = self._solved(self.fit + self.aside, kept, ridge)
        return Fitted(weight.to(self.weight.dtype), None if bias is None else bias.to(self.weight.dtype))

    def _best_ridge(self, kept: Tensor) -> float:
        errors = {}
        for ridge in RIDGES:
            weight, _ = self._solved(self.fit, kept, ridge)
            xx, tx = self.aside.about(*self._origin(self.fit))
            errors[ridge] = float(((weight @ xx) * weight).sum() - 2 * (weight * tx).sum())
        return min(RIDGES, key=errors.__getitem__)

    def _origin(self, sums: Sums) -> tuple[Tensor, Tensor]:
        """What a bias takes away before the weights see it."""
        share = 1.0 if self.with_bias else 0.0
        return share * sums.x / sums.count, share * sums.t / sums.count

    def _solved(self, sums: Sums, kept: Tensor, ridge: float) -> tuple[Tensor, Tensor | None]:
        x, t = self._origin(sums)
        weight = refit(self.weight, kept, *sums.about(x, t), ridge)
        return weight, (t - weight @ x if self.with_bias else None)
