"""k-means of queries or keys, one clustering per unit, on any device, with the same bits every time.

Centres start at evenly spaced rows and are means of their members; a cluster that loses all of them keeps its centre. Sums are products with
one-hot rows, unit by unit, never scattered.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Clusters:
    """Labels of rows, and the centres they belong to.

    Attributes:
        labels: cluster of each row.
        centres: mean of each cluster's rows.
        sizes: how many they are.
    """

    labels: Int[Tensor, "*unit S"]
    centres: Float[Tensor, "*unit K D"]
    sizes: Int[Tensor, "*unit K"]

    @property
    def order(self) -> Int[Tensor, "*unit S"]:
        """Rows by cluster; inside one, in their own sequence."""
        return self.labels.argsort(dim=-1, stable=True)


def k_means(
    x: Float[Tensor, "*unit S D"], count: int, *, iterations: int, start: Float[Tensor, "*unit K D"] | None = None
) -> Clusters:
    """Lloyd's iterations.

    Args:
        x: the rows.
        count: clusters; no more than there are rows.
        iterations: how often centres move.
        start: centres to start from, such as an earlier step's.
    """
    rows = x.shape[-2]
    count = min(count, rows)
    flat = x.reshape(-1, rows, x.shape[-1]).float()
    if start is None:
        start = flat[:, (2 * torch.arange(count, device=x.device) + 1) * rows // (2 * count)]
    centres = start.reshape(-1, count, x.shape[-1]).float()
    for _ in range(iterations):
        centres, _ = _means(flat, _nearest(flat, centres), centres)
    labels = _nearest(flat, centres)
    centres, sizes = _means(flat, labels, centres)
    unit = x.shape[:-2]
    return Clusters(labels.view(*unit, rows), centres.view(*unit, count, -1), sizes.view(*unit, count))


def _nearest(x: Float[Tensor, "U S D"], centres: Float[Tensor, "U K D"]) -> Int[Tensor, "U S"]:
    """Least distance: |x|² is the same for all centres."""
    return torch.stack(
        [(one @ own.T - 0.5 * own.square().sum(-1)).argmax(-1) for one, own in zip(x, centres, strict=True)]
    )


def _means(
    x: Float[Tensor, "U S D"], labels: Int[Tensor, "U S"], before: Float[Tensor, "U K D"]
) -> tuple[Float[Tensor, "U K D"], Int[Tensor, "U K"]]:
    number = torch.arange(before.shape[1], device=x.device)[:, None]
    sums, sizes = [], []
    for one, own in zip(x, labels, strict=True):
        member = (own == number).float()
        sums.append(member @ one)
        sizes.append(member.sum(-1))
    size = torch.stack(sizes)[..., None]
    return torch.where(size > 0, torch.stack(sums) / size.clamp(min=1), before), size[..., 0].long()
