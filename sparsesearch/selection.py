"""Choosing the best entries of a row of scores: top-k and top-p, with ties that go to the earlier entry.

Budgets may differ from row to row and lie on the device; nothing here waits for the host, and no shape depends on the data. A row's values are
sorted, the last one that is kept is read off, and entries are compared with it: on an H200, 32 heads x 2048 x 2048 tiles sort in 4 ms, ranking
them by their sorted indices takes 10 ms, and finding the threshold bit by bit 36 ms.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_k(scores: Float[Tensor, "*rows N"], count: int | Int[Tensor, "*#rows 1"]) -> Bool[Tensor, "*rows N"]:
    """The `count` best entries of each row.

    Args:
        scores: no NaN; -inf marks entries that come last, and that are chosen all the same if the count reaches them.
        count: entries per row; more than N takes all.
    """
    scores = scores.float()
    wanted = torch.full((1,), count, device=scores.device) if isinstance(count, int) else count
    return _first(scores, scores.sort(dim=-1, descending=True).values, wanted)


def top_p(weights: Float[Tensor, "*rows N"], share: float, always: Bool[Tensor, "*#rows N"]) -> Bool[Tensor, "*rows N"]:
    """`always`, and the smallest set of best other entries of each row that brings its weight to `share` of the total.

    Args:
        weights: not negative.
        share: in (0, 1].
        always: entries that are in whatever they weigh; their weight counts first.
    """
    weights = weights.float()
    others = weights.masked_fill(always, 0.0)
    # a little less than asked for, lest rounding of the sums take in one more entry
    target = share * (1 - 1e-6) * weights.sum(-1, keepdim=True, dtype=torch.float64)
    target = target - (weights - others).sum(-1, keepdim=True, dtype=torch.float64)
    ordered = others.sort(dim=-1, descending=True).values
    held = ordered.cumsum(-1, dtype=torch.float64)
    count = (held < target).sum(-1, keepdim=True) + (target > 0)
    return _first(others, ordered, count) | always


def _first(
    scores: Float[Tensor, "*rows N"], ordered: Float[Tensor, "*rows N"], count: Int[Tensor, "*#rows 1"]
) -> Bool[Tensor, "*rows N"]:
    """The first `count` entries of each row in sorted order, equal ones in the order of the row; `ordered` are the sorted values."""
    size = scores.shape[-1]
    if size == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    count = count.clamp(max=size).expand(*scores.shape[:-1], 1)
    last = ordered.gather(-1, (count - 1).clamp(min=0))
    above, equal = scores > last, scores == last
    ties = count - above.sum(-1, keepdim=True)
    return (above & (count > 0)) | (equal & (equal.cumsum(-1, dtype=torch.int32) <= ties))
